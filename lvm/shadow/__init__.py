"""Paired replays of all candidates, each in a process of its own."""
