"""Gates: lanes, losses, figures."""
