"""The search for the smallest KV cache that passes the gate. Knows an engine only as a `Target`.

`run` is the whole of it; `TuneSettings` what to ask, `TuneResult` what comes out.
"""

from kvtune.tune.loads import choose_for_quality
from kvtune.tune.settings import Progress, ProgressEvent, TuneResult, TuneSettings, parse_slo
from kvtune.tune.space import SearchSpace
from kvtune.tune.study import check_output, has_study
from kvtune.tune.tuner import run

__all__ = [
    "Progress",
    "ProgressEvent",
    "SearchSpace",
    "TuneResult",
    "TuneSettings",
    "check_output",
    "choose_for_quality",
    "has_study",
    "parse_slo",
    "run",
]
