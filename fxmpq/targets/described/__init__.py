"""Targets of one's own, described in a TOML file."""
