"""Results of the entry points as tables and figures."""
