"""Serving, simulated: the engine's own scheduler and cache manager under a clock driven by a cost model."""

from kvtune.sim.cost_model import (
    CostModel,
    FitError,
    FittedCost,
    RooflineCost,
    load_calibration,
    median_by_shape,
    shape_cells,
)
from kvtune.sim.report import ServeTargets, run_report
from kvtune.sim.requests import SimRequest, SimWorkload, of_tokens, of_trace
from kvtune.sim.simulator import STEP_COLUMNS, Simulation, SimulationRun

__all__ = [
    "STEP_COLUMNS",
    "CostModel",
    "FitError",
    "FittedCost",
    "RooflineCost",
    "ServeTargets",
    "SimRequest",
    "SimWorkload",
    "Simulation",
    "SimulationRun",
    "load_calibration",
    "median_by_shape",
    "of_tokens",
    "of_trace",
    "run_report",
    "shape_cells",
]
