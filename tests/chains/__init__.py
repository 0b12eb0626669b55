"""Tests of lvm.chains."""
