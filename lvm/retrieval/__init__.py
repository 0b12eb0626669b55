"""Search of a whole bank: exact, corrected for hubs, by a serving index."""
