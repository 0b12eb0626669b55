"""Tests of lvm.report."""
