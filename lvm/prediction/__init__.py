"""The one way from a predictor to predicted vectors, at once or vector by vector."""
