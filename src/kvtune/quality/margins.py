"""Named limits of what counts as harm. One level each; a recipe records the level it was proven at.

near-lossless: mean KL 0.003, 2.5 points of top-1 flips, delta-NLL 0.005, 2 points of probes. For scale,
llama.cpp measures KL 0.001-0.0025 for its 8-bit KV cache and 0.008 for its 4-bit one.
balanced admits 4-bit class damage (KL 0.02, flips 5 points), aggressive stays below twice 4-bit *weights*
(0.031). delta-NLL grows with the KL limit: by Pinsker's inequality the shift of an expectation grows
with the root of KL, measured means stay near KL itself, so 5/3 of the KL limit, as in near-lossless.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from kvtune.errors import UsageError

__all__ = ["MARGINS", "Margin", "margin_named"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Margin:
    """Largest allowed 95 % upper bound, above the A/A floor, of each metric's mean per token."""

    name: str
    kl: float
    """nats"""
    flips: float
    """share of tokens whose most likely token changed"""
    delta_nll: float
    """nats"""
    probes: float = 0.02
    """share of answers lost, less those gained: of probes, and of the user's own checker"""

    def limits(self) -> Mapping[str, float]:
        return {"kl": self.kl, "flips": self.flips, "delta_nll": self.delta_nll}

    def to_dict(self) -> dict[str, float | str]:
        return asdict(self)


MARGINS = {
    margin.name: margin
    for margin in (
        Margin(name="near-lossless", kl=0.003, flips=0.025, delta_nll=0.005),
        Margin(name="balanced", kl=0.02, flips=0.05, delta_nll=0.033, probes=0.03),
        Margin(name="aggressive", kl=0.05, flips=0.10, delta_nll=0.083, probes=0.05),
    )
}


def margin_named(name: str, *, probes: float | None = None) -> Margin:
    """`probes`: another limit for right-or-wrong answers. UsageError lists the known names."""
    try:
        found = MARGINS[name]
        return found if probes is None else replace(found, probes=probes)
    except KeyError:
        raise UsageError(f"unknown margin {name!r}; known: {', '.join(MARGINS)}") from None
