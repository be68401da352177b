"""What was found of one architecture, and what of it is not as it should be."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

_FOLDED_DB = 100.0
AGREEMENT_DB = 35.0


@dataclass
class Row:
    """One row of the coverage table; a stage that failed leaves its error and no figure.

    Args:
        name: Transformers' `model_type`.
        parameters: How many values it holds.
        has_batch_norm: Whether batch norms are folded, which rounds anew.
        batch: `any`, or the number of samples that the trace is fixed to.
        sequence: `any`, the length that the trace is fixed to, or empty without token ids.
        quantizable: Weights in products and convolutions that are quantizable.
        weights: All of them.
        left: Those that are not, by reason.
        equals_trace: Whether the prepared graph, quantizers off, gives the traced graph's bits.
        off_db: SQNR of its outputs against the model's, `inf` if equal bit for bit.
        uniform_db: Output SQNR on calibration data, by precision of all layers.
        worst: The group whose quantization alone disturbs the output most, and the SQNR then, by
            precision that is below what is asked.
        shares: The plan's weights relative to float, by target.
        plan_db: Output SQNR of the plan on calibration data, by target.
        agreement_db: SQNR of the converted model against the simulation, by target, on a batch
            of another size.
        layer_db: Where that is low, the layer that agrees least on the inputs it got, and its
            SQNR, by target; an empty name is what follows the last layer.
        seconds: CPU time by stage.
        errors: What a stage raised.
    """

    name: str
    parameters: int = 0
    has_batch_norm: bool = False
    batch: str = ""
    sequence: str = ""
    quantizable: int = 0
    weights: int = 0
    left: dict[str, int] = field(default_factory=dict)
    equals_trace: bool = False
    off_db: float = math.nan
    uniform_db: dict[str, float] = field(default_factory=dict)
    worst: dict[str, tuple[str, float]] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    plan_db: dict[str, float] = field(default_factory=dict)
    agreement_db: dict[str, float] = field(default_factory=dict)
    layer_db: dict[str, tuple[str, float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    @property
    def amplifies(self) -> bool:
        """Whether the runtime's outputs differ though each layer agrees on the inputs it got."""
        _, layer = self.layer_db.get("onnxruntime", ("", -math.inf))
        return layer >= AGREEMENT_DB

    @property
    def faults(self) -> list[str]:
        """What is not as it should be, for people; empty where every column passes."""
        found = [f"{stage}: {error.splitlines()[0]}" for stage, error in self.errors.items()]
        if "trace" in self.errors or "build" in self.errors:
            return found
        least = _FOLDED_DB if self.has_batch_norm else math.inf
        if not (self.equals_trace and self.off_db >= least):
            found.append(f"with quantizers off {self.off_db:.1f} dB")
        if not self.uniform_db.get("w16a16", math.nan) >= 60.0:
            found.append(f"{self.uniform_db.get('w16a16', math.nan):.1f} dB at 16 bit")
        if not self.uniform_db.get("w8a8", math.nan) >= 20.0 and "w8a8" not in self.worst:
            found.append("below 20 dB at 8 bit, no layer named")
        found += [f"{t} at {s:.1%}" for t, s in self.shares.items() if s > 0.15]
        if self.agreement_db.get("reference") != math.inf:
            found.append("reference differs from the simulation")
        agreement = self.agreement_db.get("onnxruntime", math.nan)
        if not (agreement >= AGREEMENT_DB or self.amplifies):
            found.append(f"onnxruntime agrees at {agreement:.1f} dB")
        return found
