"""Text corpora in reading order, embedded to banks."""
