"""Tests of lvm.phases."""
