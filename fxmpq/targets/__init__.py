"""Targets: what each runtime runs, as data, and one converter each."""
