"""Where the bits went: codecs by layer and side, what each loses alone, and the tables that were judged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvtune.report import record
from kvtune.report.blocks import (
    Bar,
    Bars,
    Block,
    Cell,
    Interval,
    Intervals,
    Paragraph,
    Section,
    Table,
    placed,
    placed_figure,
    verdict_cell,
)
from kvtune.report.record import Place, as_mapping, figure, find, number, show, show_layers, show_number

__all__ = ["allocation_section"]

SIDES = {"k": "keys", "v": "values"}
SIDE_HEADERS = ("Layer", "Keys", "Keys: bytes/token", "Keys: KL added alone", "Values",
                "Values: bytes/token", "Values: KL added alone")  # fmt: skip
HARM_HEADERS = ("Layers", "Side", "Stored as", "KL added alone, nats/token", "Measured by")
TABLE_HEADERS = ("Layers apart", "Budget, bytes/token", "Bytes/token", "KL predicted", "KL of the whole",
                 "KL, upper bound", "Gate", "Sides raised")  # fmt: skip
METHODS = {"planes": "reading the high plane", "replay": "one replay each"}


def allocation_section(result: Mapping[str, Any]) -> Section | None:
    """None where codecs were not searched by layer."""
    root = Place(result).at("layers")
    if not root.value:
        return None
    title = "Where the bits went"
    skipped = show(root.at("skipped").value) if root.at("skipped").value else ""
    blocks: list[Block] = [Paragraph(_decision(root, skipped), "warn" if skipped else "")]
    if root.at("sides").elements():
        blocks += [_sides(root), _bytes_bars(root)]
    if root.at("sensitivities").elements():
        blocks += [_harm_intervals(result, root), _harms(root)]
    if root.at("tables").elements():
        blocks.append(_tables(root))
    return Section(title, tuple(blocks))


def _decision(root: Place, skipped: str) -> str:
    anchor, size = root.at("anchor").value, root.at("anchor_bytes_per_token").value
    uniform = f"the smallest configuration with one pair of codecs for all layers, {_pair(anchor)} at "
    uniform += f"{show_number(number(size) or 0.0, 'bytes')} per token"
    if skipped:
        return f"Codecs were not searched by layer beyond {uniform}: {skipped}."
    shown = number(root.at("bytes_per_token").value)
    searched = (
        f"Searched from {uniform}: each layer and side was stored in fewer bits alone, a knapsack proposed "
        "tables for byte budgets, and the gate replayed each table whole. "
    )
    if root.at("is_winner").value is True and shown is not None and number(size):
        saved = 1 - shown / float(size)
        return f"{searched}The winner takes {show_number(shown, 'bytes')} per token, {saved:.1%} fewer."
    return f"{searched}No table was confirmed, so one pair of codecs serves all layers."


def _pair(config: Any) -> str:
    fields = as_mapping(config)
    return f"{show(fields.get('k_codec'))}/{show(fields.get('v_codec'))}"


def _sides(root: Place) -> Table:
    """One row per layer; a codec smaller than the anchor's stands out."""
    anchor = as_mapping(root.at("anchor").value)
    rows: dict[str, list[Cell]] = {}
    for place in root.at("sides").elements():
        layer, side = show(place.at("layer").value), show(place.at("side").value)
        name = f"layers.{layer}.{side}"
        changed = place.at("codec").value != anchor.get(f"{side}_codec")
        harm = place.at("kl")
        rows.setdefault(layer, [Cell(f"layer {layer}", pointer=place.at("layer").pointer)]).extend(
            (
                placed(place.at("codec"), test_id=f"{name}.codec", tone="good" if changed else ""),
                placed(place.at("bytes_per_token"), "bytes", test_id=f"{name}.bytes"),
                placed_figure(harm, test_id=f"{name}.kl") if harm.value else Cell("as before", tone="muted"),
            )
        )
    padding = show_number(number(root.at("padding_bytes_per_token").value) or 0.0, "bytes")
    caption = f"{'The winner' if root.at('is_winner').value is True else 'The smallest that passed'}: codecs "
    caption += f"and bytes by layer and side; block padding takes {padding} per token more"
    whole = (tuple(cells) for cells in rows.values() if len(cells) == len(SIDE_HEADERS))
    return Table(caption, SIDE_HEADERS, tuple(whole))


def _bytes_bars(root: Place) -> Bars:
    bars = tuple(
        Bar(
            f"{show(place.at('side').value).upper()}{show(place.at('layer').value)}",
            number(place.at("bytes_per_token").value) or 0.0,
            f"layer {show(place.at('layer').value)}, {SIDES.get(show(place.at('side').value), '')}: "
            f"{show(place.at('codec').value)}, {show(place.at('bytes_per_token').value, 'bytes')} per token",
        )
        for place in root.at("sides").elements()
    )
    summary = "Bytes per token of each layer's keys (K) and values (V), layers from left to right."
    return Bars("Bytes by layer and side", "side and layer", "bytes per token", bars, summary, "bytes")


def _harm_name(place: Place) -> str:
    layers = [show(layer.value) for layer in place.at("layers").elements()]
    span = layers[0] if len(layers) == 1 else f"{layers[0]}-{layers[-1]}" if layers else record.NOT_RECORDED
    return f"{show(place.at('side').value).upper()}{span} {show(place.at('codec').value)}"


def _harm_intervals(result: Mapping[str, Any], root: Place) -> Intervals:
    """Each side's own damage against the margin of all of them together."""
    limit = number(find(result, "margin.kl")) or 0.0
    rows: list[Interval] = []
    for place in root.at("sensitivities").elements():
        shown = figure(place.at("kl").value)
        if shown.value is None:
            continue
        low = shown.value if shown.low is None else shown.low
        high = shown.value if shown.high is None else shown.high
        tone = "bad" if shown.value > limit else "good" if high < limit / 3 else "warn"
        note = f"{_harm_name(place)}: adds {show_number(shown.value)} nats per token"
        rows.append(Interval(_harm_name(place), low, shown.value, high, tone, note))
    return Intervals(
        "What each layer and side loses alone", "KL added, nats per token", tuple(rows), limit,
        "margin of the whole",
    )  # fmt: skip


def _harms(root: Place) -> Table:
    rows = tuple(
        (
            Cell(", ".join(show(layer.value) for layer in place.at("layers").elements()),
                 pointer=place.at("layers").pointer),
            Cell(SIDES.get(show(place.at("side").value), "-"), pointer=place.at("side").pointer),
            placed(place.at("codec")),
            placed_figure(place.at("kl")),
            Cell(METHODS.get(show(place.at("method").value), show(place.at("method").value)),
                 pointer=place.at("method").pointer),
        )
        for place in root.at("sensitivities").elements()
    )  # fmt: skip
    count = show(root.at("num_requests").value)
    caption = (
        f"KL that one change adds to {_pair(root.at('anchor').value)}, on {count} requests of the search"
    )
    return Table(caption, HARM_HEADERS, rows)


def _tables(root: Place) -> Table:
    rows = tuple(
        (
            Cell(
                _differing(place.at("config").value, root.at("anchor").value),
                pointer=place.at("config").pointer,
            ),
            placed(place.at("budget_bytes_per_token"), "bytes"),
            placed(place.at("bytes_per_token"), "bytes", test_id=f"layers.tables.{index}.bytes"),
            placed(place.at("predicted_kl")),
            placed(place.at("kl"), test_id=f"layers.tables.{index}.kl"),
            placed(place.at("kl_high")),
            verdict_cell(place.at("verdict").value),
            placed(place.at("repairs")),
        )
        for index, place in enumerate(root.at("tables").elements())
    )
    caption = "Tables in the order the gate replayed them on the search half: the sum of isolated KL is a "
    return Table(caption + "prediction, the replay of the whole is what counts", TABLE_HEADERS, rows)


def _differing(config: Any, anchor: Any) -> str:
    """The layers that have codecs of their own; those of the others where they are not the anchor's."""
    fields = as_mapping(config)
    table = show_layers(fields.get("layer_codecs"))
    if not table or _pair(config) != _pair(anchor):
        return f"{_pair(config)}; {table}".removesuffix("; ")
    return table
