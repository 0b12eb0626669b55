"""Tests of lvm.lanes."""
