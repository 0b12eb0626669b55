"""Results as tables or figures."""
