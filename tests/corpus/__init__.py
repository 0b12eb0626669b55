"""Tests of lvm.corpus."""
