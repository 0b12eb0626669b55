"""From windows to trained weights, knowing nothing of logging."""
