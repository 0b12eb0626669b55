"""Predictors as torch modules; `table` lists them by name, `predict` runs them."""
