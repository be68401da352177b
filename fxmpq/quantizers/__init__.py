"""Quantizers: tensor code that knows no graph (codes, scales, ranges, and the modules)."""
