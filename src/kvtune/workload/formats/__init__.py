"""The formats kvtune reads. A new one costs a file here, a line in the dict, a test, a line in the docs."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from kvtune.workload.formats import (
    agent_sessions,
    canonical,
    hashed,
    lengths,
    openai_chat,
    ragpulse,
    servegen,
    sharegpt,
    synthetic,
)
from kvtune.workload.formats.record import Format

__all__ = ["FORMATS", "Format"]

FORMATS: Final[Mapping[str, Format]] = MappingProxyType(
    {
        # Tried in this order: the more specific first.
        "kvtune": canonical.FORMAT,
        "sharegpt": sharegpt.FORMAT,
        "openai_batch": openai_chat.BATCH,
        "ragpulse": ragpulse.REQUESTS,
        "bailian": hashed.BAILIAN,
        "mooncake": hashed.MOONCAKE,
        "openai_chat": openai_chat.CHAT,
        "agent_sessions": agent_sessions.FORMAT,
        "azure": lengths.AZURE,
        "burstgpt": lengths.BURSTGPT,
        "servegen": servegen.RATES,
        "servegen_lengths": servegen.LENGTHS,
        "ragpulse_chunks": ragpulse.CHUNKS,
        "synthetic": synthetic.FORMAT,
        "prompts": openai_chat.PROMPTS,
        "guidellm": openai_chat.GUIDELLM,
    }
)
