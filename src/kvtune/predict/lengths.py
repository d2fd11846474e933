"""Output length, learned while serving: who asks, which conversation, how long the prompt is, how much of it
is new.

Each context (everybody, a client, a session, a class of prompt lengths) keeps a discounted histogram of the
lengths it saw and leans on the wider context as long as it saw few: session -> client -> everybody
(the back-off of Bell and Witten's compression models with a fixed pseudo-count). Which of these views is
to be trusted is not known beforehand and differs between traces, so they are mixed by how well each has
predicted so far (fixed share, Herbster and Warmuth 1998): the mixture's log-loss is that of the best view
plus a constant. Behind all of it stands the constant baseline, the plain histogram of everything seen, and a
gate that lets the mixture speak only while it beats that baseline.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Final

import numpy as np

from kvtune.errors import UsageError
from kvtune.predict.distribution import LengthDistribution
from kvtune.predict.gate import Gate
from kvtune.predict.grid import EDGES, NUM_BUCKETS, WIDTHS, Floats, bucket_of, kernel_rows

__all__ = ["LengthKey", "LengthPredictor"]

_SWITCH_SHARE: Final = 0.002
"""Share of trust handed round after every outcome, so that a view that lost it can come back."""
_PROMPT_CLASSES_PER_OCTAVE: Final = 2
_NEW_CLASSES_PER_OCTAVE: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthKey:
    """What is known of a request before it runs. Empty names and 0 tokens mean unknown.

    `new_tokens`: the part of the prompt that no earlier request sent, as a prefix cache sees it: a tool's
    reply, a question, a document.
    """

    client: str = ""
    session: Hashable = ""
    prompt_tokens: int = 0
    new_tokens: int = 0


@dataclass(frozen=True, slots=True)
class _View:
    """One way to look at a request: the context it names, how fast it forgets and how wide it smooths.

    `parent`: index of the view it leans on, with `pseudo_count` observations' weight. `half_life` is in
    the context's own observations. `spread`: Gaussian smoothing in buckets (eight per octave).
    """

    name: str
    parent: int
    half_life: float
    pseudo_count: float
    spread: float


_VIEWS: Final = (
    _View("constant", -1, math.inf, 2.0, 1.0),
    _View("recent", 0, 1000.0, 32.0, 1.0),
    _View("client", 1, 500.0, 16.0, 1.5),
    _View("session", 2, 16.0, 4.0, 4.0),
    _View("session, last", 2, 2.0, 1.5, 8.0),
    _View("prompt length", 2, 500.0, 12.0, 2.0),
    _View("client and prompt length", 5, 250.0, 8.0, 3.0),
    _View("new tokens", 2, 500.0, 12.0, 2.0),
    _View("session and new tokens", 7, 8.0, 4.0, 4.0),
    _View("session over new tokens", 7, 40.0, 12.0, 4.0),
)
_KERNELS: Final = tuple(kernel_rows(view.spread) for view in _VIEWS)
_UNSEEN: Final[Floats] = WIDTHS * (EDGES[:-1] + 1.0) ** -2.0
_PRIOR: Final[Floats] = _UNSEEN / _UNSEEN.sum()
"""What is believed of lengths never seen: none is ruled out, and whoever outlived all that was seen is as
likely to end as to go on before its length has doubled (heavier tails make batches look endless)."""


class _Context:
    """A discounted histogram."""

    __slots__ = ("counts", "weight")

    def __init__(self) -> None:
        self.counts: Floats = np.zeros(NUM_BUCKETS)
        self.weight = 0.0

    def add(self, row: Floats, half_life: float) -> None:
        keep = 1.0 if math.isinf(half_life) else 0.5 ** (1.0 / half_life)
        self.counts *= keep
        self.counts += row
        self.weight = self.weight * keep + 1.0


class LengthPredictor:
    """Online distribution of output lengths. A prediction costs about as much as hashing a short prompt.

    Not thread-safe. Memory is bounded: at most `max_contexts` histograms of about 1 kB each per view, the
    longest unused leave.
    """

    def __init__(self, *, max_contexts: int = 4096, min_observations: int = 32) -> None:
        if max_contexts < 1 or min_observations < 1:
            raise UsageError(
                "max_contexts and min_observations must be at least 1, "
                f"found {max_contexts} and {min_observations}"
            )
        self._max_contexts = max_contexts
        self._min_observations = min_observations
        self._contexts: list[OrderedDict[Hashable, _Context]] = [OrderedDict() for _ in _VIEWS]
        self._trust: Floats = np.full(len(_VIEWS), 1.0 / len(_VIEWS))
        self.num_observed = 0
        self.gate = Gate(scale=2.0)

    # --- asking

    @property
    def is_ready(self) -> bool:
        """Whether enough lengths were seen to say anything."""
        return self.num_observed >= self._min_observations

    def predict(self, key: LengthKey, *, max_tokens: int | None = None) -> LengthDistribution:
        """What to act on: the mixture while the gate is on, else the constant baseline."""
        if not self.gate.is_on:
            return self.predict_constant(max_tokens=max_tokens)
        return self.predict_keyed(key, max_tokens=max_tokens)

    def predict_keyed(self, key: LengthKey, *, max_tokens: int | None = None) -> LengthDistribution:
        """The mixture of all views, whatever the gate says."""
        return LengthDistribution(self._trust @ self._views(key), max_tokens=max_tokens)

    def predict_constant(self, *, max_tokens: int | None = None) -> LengthDistribution:
        """The baseline: everything seen, equally weighted, no keys."""
        return LengthDistribution(self._view(0, None, _PRIOR), max_tokens=max_tokens)

    def trust(self) -> dict[str, float]:
        """How much each view counts now; sums to 1."""
        return {view.name: float(share) for view, share in zip(_VIEWS, self._trust, strict=True)}

    # --- learning

    def observe(self, key: LengthKey, length: int, *, is_censored: bool = False) -> None:
        """An output ended after `length` tokens; `is_censored`: it was cut off there and would have gone on.

        A cut-off output teaches what lies above the cut: its mass goes where the mixture expects it
        (Efron 1967, redistribution to the right), and it does not judge the views.
        """
        if length < 0:
            raise UsageError(f"an output length cannot be negative, found {length}")
        views = self._views(key)
        if is_censored:
            self._learn(key, self._mass_above(length, views), None)
            return
        bucket = bucket_of(length)
        losses = -np.log(views[:, bucket])
        mixed = -math.log(float(self._trust @ views[:, bucket]))
        if self.is_ready:
            self.gate.observe(float(losses[0]), mixed)
        trust = self._trust * np.exp(-(losses - losses.min()))
        trust /= trust.sum()
        self._trust = (1.0 - _SWITCH_SHARE) * trust + _SWITCH_SHARE / len(trust)
        self._learn(key, None, bucket)

    # --- inside

    def _names(self, key: LengthKey) -> tuple[Hashable, ...]:
        """The context each view sees this request in; None where the request does not say."""
        client = key.client or None
        session = (key.client, key.session) if key.session != "" else None
        prompt = _size_class(key.prompt_tokens, _PROMPT_CLASSES_PER_OCTAVE)
        new = _size_class(key.new_tokens, _NEW_CLASSES_PER_OCTAVE)
        client_prompt = (key.client, prompt) if client and prompt is not None else None
        session_new = (session, new) if session and new is not None else None
        return ("", "", client, session, session, prompt, client_prompt, new, session_new, session)

    def _views(self, key: LengthKey) -> Floats:
        """Masses by view, [views, NUM_BUCKETS], every one positive and summing to 1."""
        rows: list[Floats] = []
        for index, (view, name) in enumerate(zip(_VIEWS, self._names(key), strict=True)):
            parent = _PRIOR if view.parent < 0 else rows[view.parent]
            rows.append(parent if name is None else self._view(index, name, parent))
        return np.array(rows)

    def _view(self, index: int, name: Hashable, parent: Floats) -> Floats:
        context = self._contexts[index].get("" if name is None else name)
        if context is None:
            return parent
        lean = _VIEWS[index].pseudo_count
        return (context.counts + lean * parent) / (context.weight + lean)

    def _mass_above(self, length: int, views: Floats) -> Floats | None:
        expected = (self._trust @ views) * np.clip((EDGES[1:] - 1 - length) / WIDTHS, 0.0, 1.0)
        total = float(expected.sum())
        return expected / total if total > 0.0 else None

    def _learn(self, key: LengthKey, masses: Floats | None, bucket: int | None) -> None:
        if masses is None and bucket is None:
            return
        self.num_observed += 1
        for index, name in enumerate(self._names(key)):
            if name is None:
                continue
            row = _KERNELS[index][bucket] if masses is None else masses @ _KERNELS[index]
            self._context(index, name).add(row, _VIEWS[index].half_life)

    def _context(self, index: int, name: Hashable) -> _Context:
        known = self._contexts[index]
        context = known.get(name)
        if context is None:
            context = known[name] = _Context()
            if len(known) > self._max_contexts:
                known.popitem(last=False)
        else:
            known.move_to_end(name)
        return context


def _size_class(tokens: int, per_octave: int) -> int | None:
    return None if tokens < 1 else math.floor(per_octave * math.log2(tokens))
