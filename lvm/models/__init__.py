"""Predictors as torch modules, listed by name in `table`."""
