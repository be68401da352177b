"""Calibration: every candidate format's ranges, from one pass over the data."""
