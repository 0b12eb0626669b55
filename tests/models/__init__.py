"""Tests of lvm.models."""
