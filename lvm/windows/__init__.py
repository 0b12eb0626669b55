"""Splits, windows and frozen queries of a bank, with a leak audit."""
