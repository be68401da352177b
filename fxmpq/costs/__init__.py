"""Costs: what every (group, precision) takes."""
