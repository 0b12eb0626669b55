"""Predictors measured on frozen queries beside the free ones."""
