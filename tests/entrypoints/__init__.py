"""Tests of entrypoints."""
