"""One canonical request trace: readers for the formats people have, real tokens for traces that hold
only lengths and hashes, generators, splits and reuse statistics. No tensors."""

from kvtune.workload.load import load_workload
from kvtune.workload.materialise import materialise
from kvtune.workload.request import (
    Materialised,
    Message,
    Rejection,
    TokenRequest,
    Workload,
    WorkloadRequest,
)

__all__ = [
    "Materialised",
    "Message",
    "Rejection",
    "TokenRequest",
    "Workload",
    "WorkloadRequest",
    "load_workload",
    "materialise",
]
