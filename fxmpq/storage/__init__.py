"""Saving graphs to a folder and loading them again: data only, nothing that executes code."""
