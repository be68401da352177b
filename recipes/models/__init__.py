"""Models that the recipes bring along with trained weights."""
