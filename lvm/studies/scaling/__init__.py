"""Whether more data or a wider model would pay: grids of trainings with a verdict."""
