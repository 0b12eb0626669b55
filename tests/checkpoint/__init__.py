"""Tests of lvm.checkpoint."""
