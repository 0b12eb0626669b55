"""Train a model on windows of a bank; logging is left to the caller."""
