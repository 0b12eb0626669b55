"""Figures of each lane, from which weak lanes are told."""
