"""Tests of lvm/studies."""
