"""Tests of lvm.promotion."""
