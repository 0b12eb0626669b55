"""Questions asked of many trainings."""
