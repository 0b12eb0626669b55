"""Tests of lvm/phases."""
