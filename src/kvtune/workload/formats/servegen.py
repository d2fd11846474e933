"""ServeGen (arXiv 2505.09999): client profiles, from which requests are drawn.

`..._rates.csv`: `t_s,client,rate_rps,cv,arrival_dist,p1,p2`, one row per client and window of 600 s; the
gaps between a client's requests are Gamma or Weibull with shape `p1`, scaled to the rate.
`..._lengths.csv`: `t_s,client,field,mean,p5..p99`, one row per client, field and window of 6 h.
The two are looked for beside each other. A profile may describe billions of requests; as ServeGen does,
all rates are scaled to a number that can be drawn, which keeps every client's burstiness and the daily shape.
"""

from __future__ import annotations

import bisect
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kvtune.workload.formats.record import Format
from kvtune.workload.records import read_rows
from kvtune.workload.request import WorkloadRequest
from kvtune.workload.row import Row
from kvtune.workload.source import Source

MAX_DRAWN: Final = 100_000
"""Requests drawn from a profile; seed 0, so that every run draws the same."""

_WINDOW_S: Final = 600.0
_LENGTH_WINDOW_S: Final = 21_600.0
_QUANTILES: Final = (5, 25, 50, 75, 90, 95, 99)
_RATE_COLUMNS: Final = frozenset(("t_s", "client", "rate_rps", "cv", "arrival_dist", "p1", "p2"))
_LENGTH_COLUMNS: Final = frozenset(("t_s", "client", "field", "mean", *(f"p{q}" for q in _QUANTILES)))
_PER_LENGTH_ROW: Final = 20
_LOWEST_SHAPE: Final = 0.006
"""A Weibull's mean is Gamma(1 + 1/shape), which overflows below."""


@dataclass(frozen=True, slots=True)
class _Window:
    """A client's window: expected requests and the shape of the gaps between them."""

    begin_s: float
    expected: float
    draw_gap: Callable[[random.Random], float]
    """A gap with mean 1, in units of the window's mean gap."""


def parse_profile_row(row: Row) -> Iterator[WorkloadRequest]:
    """Rows describe clients, not requests: checked here, drawn from in `finish`."""
    (_check_lengths if "field" in row.fields else _window)(row)
    return iter(())


def draw_from_rates(_: list[WorkloadRequest], path: Path) -> tuple[list[WorkloadRequest], list[str]]:
    windows: dict[str, list[_Window]] = defaultdict(list)
    for row in _rows(path):
        windows[row.text("client")].append(_window(row))
    for of_client in windows.values():
        of_client.sort(key=lambda window: window.begin_s)
    expected = sum(window.expected for of_client in windows.values() for window in of_client)
    share = min(1.0, MAX_DRAWN / expected) if expected else 1.0
    lengths_path = _beside(path, "_rates", "_lengths")
    lengths = None if lengths_path is None else _Lengths(_rows(lengths_path))
    rng = random.Random(0)  # noqa: S311  # draws load, no secrets
    requests = [
        _request(f"client-{client}#{number}", client, at, lengths, rng)
        for client, of_client in sorted(windows.items())
        for number, at in enumerate(_arrivals(of_client, share, rng))
    ]
    notes = [f"drawn from {len(windows)} client profiles of {expected:,.0f} requests"]
    if share < 1:
        notes.append(f"all rates scaled by {share:.3g}, so that the burstiness of each client stays")
    notes.append(
        "no lengths: the file of lengths is not beside the rates"
        if lengths_path is None
        else f"lengths drawn from {lengths_path.name}"
    )
    return requests, notes


def draw_from_lengths(_: list[WorkloadRequest], path: Path) -> tuple[list[WorkloadRequest], list[str]]:
    rates = _beside(path, "_lengths", "_rates")
    if rates is not None:
        requests, notes = draw_from_rates([], rates)
        return requests, [f"arrivals from {rates.name}", *notes]
    rng = random.Random(0)  # noqa: S311  # draws load, no secrets
    lengths = _Lengths(_rows(path))
    drawn = [
        _request(
            f"client-{client}@{begin:g}#{number}",
            client,
            begin + _LENGTH_WINDOW_S * rng.random(),
            lengths,
            rng,
        )
        for client, begin in lengths.windows()
        for number in range(_PER_LENGTH_ROW)
    ]
    return drawn, [
        f"{_PER_LENGTH_ROW} requests drawn per client and window: the file of rates is not beside the "
        "lengths, so arrivals and the weight of each client mean nothing"
    ]


def _rows(path: Path) -> Iterator[Row]:
    return read_rows(Source(path))[1]


def _beside(path: Path, old: str, new: str) -> Path | None:
    other = path.with_name(path.name.replace(old, new))
    return other if other != path and other.is_file() else None


def _window(row: Row) -> _Window:
    rate = row.time("rate_rps")
    shape = row.time("p1")
    kind = row.text("arrival_dist")
    if kind not in ("Gamma", "Weibull"):
        row.fail(f"'arrival_dist' must be Gamma or Weibull, found {ascii(kind)[:40]}")
    if not _LOWEST_SHAPE <= shape <= 1e6:
        row.fail(f"'p1' must be a shape between {_LOWEST_SHAPE} and 1e6, found {shape:g}")
    if rate > 1e9:
        row.fail(f"'rate_rps' must be at most 1e9, found {rate:g}")
    begin = row.time("t_s")
    if kind == "Gamma":
        return _Window(begin, rate * _WINDOW_S, lambda rng: rng.gammavariate(shape, 1 / shape))
    scale = 1 / math.gamma(1 + 1 / shape)
    return _Window(begin, rate * _WINDOW_S, lambda rng: rng.weibullvariate(scale, shape))


def _arrivals(windows: Sequence[_Window], share: float, rng: random.Random) -> Iterator[float]:
    """A renewal process through a client's windows: what is left of a gap goes on in the next window,
    at that window's rate."""
    left = windows[0].draw_gap(rng) * rng.random()
    for window in windows:
        expected = window.expected * share
        at = left
        # A gap of a very bursty client can be 0 in floating point; twice the mean is enough of a burst.
        most = 20 + 2 * int(expected)
        while at < expected and most:
            yield window.begin_s + _WINDOW_S * at / expected
            at += window.draw_gap(rng)
            most -= 1
        left = max(0.0, at - expected)


def _check_lengths(row: Row) -> tuple[str, tuple[float, ...]]:
    name = row.text("field")
    if name not in ("input_tokens", "output_tokens"):
        row.fail(f"'field' must be input_tokens or output_tokens, found {ascii(name)[:40]}")
    row.time("t_s")
    values = tuple(float(row.tokens(f"p{q}")) for q in _QUANTILES)
    if list(values) != sorted(values):
        row.fail(f"percentiles p5 to p99 must not fall, found {values}")
    return name, values


class _Lengths:
    """Quantile functions by client, field and window; the nearest window, else those of all clients."""

    def __init__(self, rows: Iterator[Row]) -> None:
        found: dict[tuple[str, str], list[tuple[float, tuple[float, ...]]]] = defaultdict(list)
        for row in rows:
            name, values = _check_lengths(row)
            found[row.text("client"), name].append((row.time("t_s"), values))
        self._tables = {key: sorted(table) for key, table in found.items()}
        self._all: Mapping[str, list[tuple[float, ...]]] = {
            name: [
                values for (_, field), table in self._tables.items() if field == name for _, values in table
            ]
            for name in ("input_tokens", "output_tokens")
        }

    def windows(self) -> list[tuple[str, float]]:
        return sorted({(client, at) for (client, _), table in self._tables.items() for at, _ in table})

    def draw(self, client: str, name: str, at: float, rng: random.Random) -> int | None:
        table = self._tables.get((client, name))
        if table is not None:
            place = bisect.bisect_right(table, at, key=lambda entry: entry[0])
            values = table[max(0, place - 1)][1]
        elif self._all[name]:
            values = rng.choice(self._all[name])
        else:
            return None
        return _from_quantiles(values, 100 * rng.random())


def _from_quantiles(values: Sequence[float], percent: float) -> int:
    """Straight lines between the published quantiles, flat outside of them."""
    place = bisect.bisect_left(_QUANTILES, percent)
    if place == 0:
        return round(values[0])
    if place == len(_QUANTILES):
        return round(values[-1])
    low, high = _QUANTILES[place - 1], _QUANTILES[place]
    weight = (percent - low) / (high - low)
    return round(values[place - 1] * (1 - weight) + values[place] * weight)


def _request(
    request_id: str, client: str, at: float, lengths: _Lengths | None, rng: random.Random
) -> WorkloadRequest:
    drawn = {
        name: None if lengths is None else lengths.draw(client, name, at, rng)
        for name in ("input_tokens", "output_tokens")
    }
    return WorkloadRequest(
        request_id=request_id,
        arrival_s=at,
        input_length=drawn["input_tokens"],
        output_length=drawn["output_tokens"],
        tags={"client": client},
    )


RATES: Final = Format(
    name="servegen",
    title="ServeGen client profiles (rates)",
    matches=lambda first: first.keys() >= _RATE_COLUMNS,
    parse=parse_profile_row,
    finish=draw_from_rates,
    columns=_RATE_COLUMNS,
    is_csv=True,
)
LENGTHS: Final = Format(
    name="servegen_lengths",
    title="ServeGen client profiles (lengths)",
    matches=lambda first: first.keys() >= _LENGTH_COLUMNS,
    parse=parse_profile_row,
    finish=draw_from_lengths,
    columns=_LENGTH_COLUMNS,
    is_csv=True,
)
