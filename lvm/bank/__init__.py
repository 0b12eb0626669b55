"""A checked store of ordered vectors with its row table."""
