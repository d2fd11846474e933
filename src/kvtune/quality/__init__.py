"""Divergence from the baseline's answers, its statistics, and the gate's verdict. numpy only.

A verdict rests on paired replays of the user's own requests, cluster-bootstrap bounds over sessions
and an A/A floor; see `verdict` for the order of decisions and `margins` for the limits.
"""

from kvtune.quality.answers import (
    AnswerOutcome,
    AnswerReference,
    Checker,
    Judged,
    judge_answers,
    load_checker,
    record_answers,
)
from kvtune.quality.bootstrap import Estimate, bootstrap_mean, bootstrap_ratio
from kvtune.quality.divergence import divergence, is_bit_equal, kl_divergence
from kvtune.quality.gate import Gate, GateCost, GateQuestions, ask_baseline, judge_candidate
from kvtune.quality.levels import Look, SharedError, looks_of
from kvtune.quality.margins import MARGINS, Margin, margin_named
from kvtune.quality.positions import kl_by_position
from kvtune.quality.probes import (
    Conversation,
    ProbeOutcome,
    ProbeReference,
    ProbeSource,
    ask_probes,
    judge_probes,
    num_probes_for,
    record_probes,
)
from kvtune.quality.proportion import wilson_interval
from kvtune.quality.replay import Reference, ReplaySettings, record_reference, replay, replay_decode
from kvtune.quality.sensitivity import isolated_kl
from kvtune.quality.speed import HIGHER_IS_BETTER, Slo, SpeedRatios, compare_speed, summarise
from kvtune.quality.tasks import TASKS, Material, Sample, draw, is_correct
from kvtune.quality.verdict import QualityVerdict, Verdict, judge

__all__ = [
    "HIGHER_IS_BETTER",
    "MARGINS",
    "TASKS",
    "AnswerOutcome",
    "AnswerReference",
    "Checker",
    "Conversation",
    "Estimate",
    "Gate",
    "GateCost",
    "GateQuestions",
    "Judged",
    "Look",
    "Margin",
    "Material",
    "ProbeOutcome",
    "ProbeReference",
    "ProbeSource",
    "QualityVerdict",
    "Reference",
    "ReplaySettings",
    "Sample",
    "SharedError",
    "Slo",
    "SpeedRatios",
    "Verdict",
    "ask_baseline",
    "ask_probes",
    "bootstrap_mean",
    "bootstrap_ratio",
    "compare_speed",
    "divergence",
    "draw",
    "is_bit_equal",
    "is_correct",
    "isolated_kl",
    "judge",
    "judge_answers",
    "judge_candidate",
    "judge_probes",
    "kl_by_position",
    "kl_divergence",
    "load_checker",
    "looks_of",
    "margin_named",
    "num_probes_for",
    "record_answers",
    "record_probes",
    "record_reference",
    "replay",
    "replay_decode",
    "summarise",
    "wilson_interval",
]
