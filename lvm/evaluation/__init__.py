"""Evaluation of predictors on frozen queries, beside the free predictors."""
