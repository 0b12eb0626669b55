"""Tests of lvm.serving."""
