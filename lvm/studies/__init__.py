"""Studies: questions asked of many trainings."""
