"""One canonical request trace: readers for the formats people have, real tokens for traces that hold
only lengths and hashes, generators, splits and reuse statistics. No tensors."""

from kvtune.workload.anonymise import anonymise
from kvtune.workload.blocks import BlockTrace, block_trace
from kvtune.workload.builtin import BUILTIN_CASES, builtin_cases, demo_chat, malformed_files
from kvtune.workload.chat import generate_chat
from kvtune.workload.drift import Shift, workload_drift
from kvtune.workload.formats import FORMATS
from kvtune.workload.formats.canonical import write_workload
from kvtune.workload.lint import LintReport, lint_workload
from kvtune.workload.load import load_workload
from kvtune.workload.materialise import DEFAULT_MAX_TOKENS, materialise
from kvtune.workload.prefix import session_labels
from kvtune.workload.profile import workload_profile
from kvtune.workload.request import (
    Materialised,
    Message,
    Rejection,
    TokenRequest,
    Workload,
    WorkloadRequest,
)
from kvtune.workload.split import split_by_session
from kvtune.workload.stationarity import Drift, Stationarity, drift_of, first_requests, stationarity
from kvtune.workload.statistics import workload_statistics

__all__ = [
    "BUILTIN_CASES",
    "DEFAULT_MAX_TOKENS",
    "FORMATS",
    "BlockTrace",
    "Drift",
    "LintReport",
    "Materialised",
    "Message",
    "Rejection",
    "Shift",
    "Stationarity",
    "TokenRequest",
    "Workload",
    "WorkloadRequest",
    "anonymise",
    "block_trace",
    "builtin_cases",
    "demo_chat",
    "drift_of",
    "first_requests",
    "generate_chat",
    "lint_workload",
    "load_workload",
    "malformed_files",
    "materialise",
    "session_labels",
    "split_by_session",
    "stationarity",
    "workload_drift",
    "workload_profile",
    "workload_statistics",
    "write_workload",
]
