"""Two answers word by word: what stands in one and not in the other."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher

from kvtune.report.blocks import Piece

__all__ = ["marked"]

_WORDS = re.compile(r"\s+|\w+|[^\w\s]")


def marked(before: str, after: str) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
    """Both texts as pieces, those that the other one lacks marked; joined they are the texts again."""
    left, right = _WORDS.findall(before), _WORDS.findall(after)
    codes = SequenceMatcher(None, left, right, autojunk=False).get_opcodes()
    return (
        _pieces([(left[i1:i2], tag != "equal") for tag, i1, i2, _, _ in codes]),
        _pieces([(right[j1:j2], tag != "equal") for tag, _, _, j1, j2 in codes]),
    )


def _pieces(runs: Sequence[tuple[Sequence[str], bool]]) -> tuple[Piece, ...]:
    return tuple(Piece("".join(words), is_changed) for words, is_changed in runs if words)
