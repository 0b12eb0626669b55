"""Results as tables and figures, one file per entry point."""
