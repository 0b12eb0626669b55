"""Chains: short ordered runs of concepts that widen a bank where it is weak."""
