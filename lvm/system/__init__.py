"""Files, signals, processes, errors, settings: needed everywhere, independent of vectors."""
