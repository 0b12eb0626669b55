"""Tests of lvm, in folders named after its packages."""
