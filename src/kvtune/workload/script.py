"""Which writing system a text is in: a cheap stand-in for its language where nobody tagged one."""

from __future__ import annotations

from typing import Final

import numpy as np

__all__ = ["script_of"]

_SAMPLE: Final = 4096
"""Characters looked at, from the end: what a user asks stands there, after any shared instructions."""

_RANGES: Final = (
    ("latin", (0x41, 0x5A), (0x61, 0x7A), (0xC0, 0x24F)),
    ("greek", (0x370, 0x3FF)),
    ("cyrillic", (0x400, 0x52F)),
    ("hebrew", (0x590, 0x5FF)),
    ("arabic", (0x600, 0x6FF), (0x750, 0x77F)),
    ("indic", (0x900, 0xDFF)),
    ("thai", (0xE00, 0xE7F)),
    ("hangul", (0x1100, 0x11FF), (0xAC00, 0xD7AF)),
    ("kana", (0x3040, 0x30FF)),
    ("han", (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0x20000, 0x3134F)),
)
_WEIGHT: Final = {"han": 3.0, "kana": 3.0, "hangul": 2.0}
"""Characters of these stand for a syllable or a word, those of the others for a sound."""


def script_of(text: str) -> str:
    """The script most of a text's letters are in, by name; `none` without letters, `other` if unknown."""
    sample = text[-_SAMPLE:]
    if sample.isascii():
        return "latin" if any(c.isalpha() for c in sample) else "none"
    points = np.frombuffer(sample.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    counts = {
        name: _WEIGHT.get(name, 1.0) * sum(int(((points >= a) & (points <= b)).sum()) for a, b in ranges)
        for name, *ranges in _RANGES
    }
    if counts["kana"] > 0.1 * counts["han"] and counts["kana"] + counts["han"] > counts["latin"]:
        return "kana"  # Japanese is written in both
    best = max(counts, key=lambda name: counts[name])
    if counts[best]:
        return best
    return "other" if any(c.isalpha() for c in sample) else "none"
