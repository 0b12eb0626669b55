"""Tests of lvm.evaluation."""
