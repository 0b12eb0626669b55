"""The phase table with its old figures, its new ones, what separates the two."""
