"""Tests of lvm.shadow."""
