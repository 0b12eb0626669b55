"""Tests of lvm.registry."""
