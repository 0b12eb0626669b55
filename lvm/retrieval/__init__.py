"""Search of a whole bank: exact ranks, hubness correction, second stage, serving index."""
