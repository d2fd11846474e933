"""What a report says, in order: the decision first, then the evidence, then how to repeat and what voids it.

Reads the record that `tune` writes as result.json. Each number of the page knows the JSON pointer of the
value it shows; a field that is missing reads "not recorded".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvtune.report.ablation_sections import ablation_section
from kvtune.report.allocation_sections import allocation_section
from kvtune.report.blocks import Code, Section
from kvtune.report.comparison import comparison_section, noise_section, rejected_section
from kvtune.report.decision import decision_section
from kvtune.report.ground import identity_section, limits_section, repeat_section, workload_section
from kvtune.report.memory_sections import memory_section
from kvtune.report.quality_sections import failing_section, position_section, quality_section
from kvtune.report.record import json_text
from kvtune.report.squeeze_section import squeeze_section
from kvtune.report.texts import cases_section, texts_section
from kvtune.report.trials import trials_section

__all__ = ["sections"]


def sections(result: Mapping[str, Any]) -> tuple[Section, ...]:
    """All sections in reading order; the last one is the raw record."""
    found = (
        decision_section(result),
        comparison_section(result),
        noise_section(result),
        trials_section(result),
        ablation_section(result),
        allocation_section(result),
        quality_section(result),
        cases_section(result),
        position_section(result),
        failing_section(result),
        squeeze_section(result),
        rejected_section(result),
        memory_section(result),
        texts_section(result),
        workload_section(result),
        limits_section(result),
        repeat_section(result),
        identity_section(result),
        raw_section(result),
    )
    return tuple(section for section in found if section is not None)


def raw_section(result: Mapping[str, Any]) -> Section:
    """The record itself, folded away."""
    return Section("Raw record", (Code(json_text(result), "raw", "result.json"),))
