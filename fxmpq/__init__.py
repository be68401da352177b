"""Mixed-precision quantization of PyTorch models: how few bits each layer can live with.

The steps, in the order they are walked: `trace`, `prepare`, `calibrate`, `measure`, `cost`,
`solve`, `apply` or `refine`, `convert`. `quantize` walks them in one call.
"""

from __future__ import annotations

from fxmpq.calibration.calibrate import calibrate
from fxmpq.costs.brought import read_costs, write_costs
from fxmpq.costs.table import CostTable
from fxmpq.costs.terms import Edge, Moment
from fxmpq.errors import FxmpqError, InfeasibleBudgetError
from fxmpq.formats import NumberFormat, Precision
from fxmpq.graph.trace import trace
from fxmpq.pipeline import quantize
from fxmpq.quantized import Quantized
from fxmpq.refinement.methods import METHODS as REFINEMENTS
from fxmpq.refinement.methods import RECIPES
from fxmpq.refinement.refine import refine
from fxmpq.sensitivity.measure import METHODS, measure
from fxmpq.sensitivity.sensitivity import Sensitivity
from fxmpq.solver.budget import Budget
from fxmpq.solver.front import ParetoFront
from fxmpq.solver.pareto import pareto
from fxmpq.solver.plan import Plan
from fxmpq.solver.programs import PROGRAMS
from fxmpq.solver.solve import solve
from fxmpq.steps import apply, cost, prepare
from fxmpq.storage.load import load
from fxmpq.storage.save import save
from fxmpq.targets.convert import convert
from fxmpq.targets.registry import TARGETS
from fxmpq.targets.target import Converted, Target
from fxmpq.training.loss import StepLoss

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "PROGRAMS",
    "RECIPES",
    "REFINEMENTS",
    "TARGETS",
    "Budget",
    "Converted",
    "CostTable",
    "Edge",
    "FxmpqError",
    "InfeasibleBudgetError",
    "Moment",
    "NumberFormat",
    "ParetoFront",
    "Plan",
    "Precision",
    "Quantized",
    "Sensitivity",
    "StepLoss",
    "Target",
    "apply",
    "calibrate",
    "convert",
    "cost",
    "load",
    "measure",
    "pareto",
    "prepare",
    "quantize",
    "read_costs",
    "refine",
    "save",
    "solve",
    "trace",
    "write_costs",
]
