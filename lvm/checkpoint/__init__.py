"""What is kept of a predictor: weights, fits on train rows, facts."""
