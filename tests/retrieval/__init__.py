"""Tests of lvm.retrieval."""
