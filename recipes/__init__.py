"""Ready-made runs of fxmpq on real models and data, imported as ``fxmpq.recipes``."""
