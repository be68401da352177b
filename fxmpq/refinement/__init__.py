"""Refinement: what a plan predicts, delivered, by rounding, bias, scale and range optimisation."""
