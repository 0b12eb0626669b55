"""Tests of lvm/system."""
