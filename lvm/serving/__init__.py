"""Predictors as MLflow serves them."""
