"""The contest for the alias: candidates, their replay in worker processes, comparison, decision."""
