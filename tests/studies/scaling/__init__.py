"""Tests of lvm/scaling."""
