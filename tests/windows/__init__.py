"""Tests of lvm.windows."""
