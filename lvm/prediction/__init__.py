"""Predictions for contexts, in batches or as a stream; used by training, evaluation and serving."""
