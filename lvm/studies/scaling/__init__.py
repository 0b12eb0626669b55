"""Does more data or a wider model help? A grid of trainings, a fit, a verdict."""
