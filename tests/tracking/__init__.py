"""Tests of lvm/tracking."""
