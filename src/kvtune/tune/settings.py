"""What a tuning run is asked to do, and the records it hands out while it runs and when it ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvtune.config import parse_duration
from kvtune.errors import UsageError
from kvtune.quality import GateQuestions, Margin, ReplaySettings, Slo, margin_named
from kvtune.recipe import Recipe

__all__ = ["Progress", "ProgressEvent", "TuneResult", "TuneSettings", "parse_slo"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneSettings:
    """Settings of one run. Times in seconds; `None` where the run decides from measured costs.

    `workload` and `engine` go into the recipe as they are (file hash, format; dtype, max_model_len).
    `max_quality_requests` bounds the replays of the search; slower engines replay fewer.
    """

    budget_s: float = 600.0
    margin: str = "near-lossless"
    slo: Slo | None = None
    kv_budget_bytes: int | None = None
    seed: int = 0
    resume: bool = False
    is_synthetic_text: bool = False
    workload: Mapping[str, Any] = field(default_factory=dict[str, Any])
    engine: Mapping[str, Any] = field(default_factory=dict[str, Any])
    price_per_hour: float | None = None
    """Of the machine, in any currency: what a token costs follows from the throughput of the loads."""
    command: str = ""
    created_at: str = ""

    context: int = 2048
    """Reference context length at which allocator bytes per token are compared."""
    latency_limit: float = 1.1
    """Largest TPOT and p95 TTFT ratio to the baseline, without an SLO."""
    replay: ReplaySettings = field(default_factory=ReplaySettings)
    max_quality_requests: int = 96
    max_confirm_requests: int = 256
    """The confirmation decides, so it replays as many requests as its time allows, up to this."""
    max_load_requests: int = 32
    num_short_load: int = 8
    load_max_tokens: int = 64
    """Longest answer in load runs: TPOT settles within some tokens, a budget does not wait for more."""
    max_trials: int = 200
    patience: int = 12
    """Measured trials in a row without a better one after which the search ends early."""
    max_confirmed: int = 6
    per_layer: bool = True
    """Also search codecs layer by layer, where the engine can."""
    squeeze: bool = False
    """Also prove which low planes of the winner may go while memory is short."""
    probe_margin: float | None = None
    """Largest net loss of probes; None as the margin says."""
    questions: GateQuestions = field(default_factory=GateQuestions)
    """What the confirmation asks beyond the replay: probes, high-value requests, judged answers."""
    text: Callable[[Sequence[int]], str] | None = None
    """Token ids to what a user reads, for answers side by side; None shows token ids."""
    emit: Callable[[Recipe, Path], Mapping[str, Any]] | None = None
    """What runs the recipe at this path, for the record: {"target", "text"} or {"target", "refusal"}."""

    @property
    def limits(self) -> Margin:
        return margin_named(self.margin, probes=self.probe_margin)

    def __post_init__(self) -> None:
        margin_named(self.margin)
        if not self.budget_s > 0:
            raise UsageError(f"the budget must be above zero seconds, found {self.budget_s}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressEvent:
    """Something worth a line: `time_left_s` of the budget; `trial` and `best` as plain records, if any."""

    stage: str
    message: str
    time_left_s: float
    trial: Mapping[str, Any] | None = None
    best: Mapping[str, Any] | None = None


Progress = Callable[[ProgressEvent], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneResult:
    """Where the recipe lies and everything the report shows (the content of result.json)."""

    recipe_path: Path
    record: Mapping[str, Any]

    @property
    def has_gain(self) -> bool:
        return self.record["status"] == "winner"


_SLO_NAMES = {"ttft_p95": "ttft_p95_s", "tpot_p95": "tpot_p95_s"}


def parse_slo(text: str) -> Slo:
    """`"ttft_p95=300ms,tpot_p95=50ms"` -> Slo. UsageError names the known targets."""
    values: dict[str, float] = {}
    for part in text.split(","):
        name, separator, value = part.strip().partition("=")
        if not separator or name not in _SLO_NAMES:
            raise UsageError(
                f"--slo wants {' and '.join(f'{n}=<duration>' for n in _SLO_NAMES)}, found {part.strip()!r}"
            )
        if _SLO_NAMES[name] in values:
            raise UsageError(f"--slo names {name} twice; keep one")
        values[_SLO_NAMES[name]] = parse_duration(value)
    return Slo(**values)
