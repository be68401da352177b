"""Reports: what was chosen, what it costs, and what was measured of it."""
