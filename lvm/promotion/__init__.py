"""Who takes the alias after a replay, gate by gate."""
