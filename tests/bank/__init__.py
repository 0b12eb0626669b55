"""Tests of lvm.bank."""
