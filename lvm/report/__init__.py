"""Results as tables and figures, a file an entry point."""
