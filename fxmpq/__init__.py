"""Mixed-precision quantization of PyTorch models: how few bits each layer can live with."""

from __future__ import annotations

__version__ = "0.1.0"
