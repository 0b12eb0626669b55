"""Which rows are train, val or test; which are read for which query."""
