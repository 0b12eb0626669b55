"""Tests of lvm.prediction."""
