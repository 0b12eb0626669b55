"""Tests of lvm.training."""
