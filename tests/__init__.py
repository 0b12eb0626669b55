"""Tests of lvm, one file for each of its files."""
