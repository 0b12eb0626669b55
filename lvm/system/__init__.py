"""What every part needs and nothing of vectors: files, signals, processes, errors."""
