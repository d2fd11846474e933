"""The ground a result stands on: traffic, identity, limits, expiry, fallback, and how to repeat it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvtune.report import record
from kvtune.report.blocks import Block, Bullets, Cell, Code, Facts, Paragraph, Section, cell, placed
from kvtune.report.record import Place, as_mapping, as_sequence, find, show, unit_of

__all__ = ["identity_section", "limits_section", "repeat_section", "workload_section"]

_FOR_VERIFY = frozenset(("behaviour", "profile"))
"""Members of the record that `kvtune verify` compares and nobody reads."""
_ELSEWHERE = frozenset(("cases", "rejected"))


def workload_section(result: Mapping[str, Any]) -> Section:
    """What was replayed and sent."""
    place = Place(result).at("workload")
    blocks: list[Block] = [_all_facts(place, _FOR_VERIFY | _ELSEWHERE)]
    if find(result, "workload.is_synthetic_text") is True:
        blocks.insert(
            0, Paragraph("Generic: the text is synthetic, so lossy settings are not proven by it.", "warn")
        )
    return Section("Workload", tuple(blocks))


def limits_section(result: Mapping[str, Any]) -> Section:
    """What the result does not say, when it ends, and where to go back to."""
    limits = _lines(find(result, "limits"))
    voided = _lines(find(result, "voided_by"))
    missing = Paragraph(record.NOT_RECORDED, "muted")
    fallback = Place(result).at("fallback")
    blocks: list[Block] = [
        Paragraph("Known limits of this result:"),
        Bullets(limits) if limits else missing,
        Paragraph("It expires, and has to be measured again, with:"),
        Bullets(voided) if voided else missing,
        Paragraph("Whether it still holds: kvtune verify recipe.json, and kvtune check on newer requests."),
        Paragraph("Fallback, and what triggers it:"),
        _all_facts(fallback, frozenset()),
    ]
    return Section("Limits, expiry, fallback", tuple(blocks))


def repeat_section(result: Mapping[str, Any]) -> Section:
    """The exact command, and what it ran with."""
    command = find(result, "command")
    root = Place(result)
    facts = (
        ("kvtune", placed(root.at("kvtune_version"), test_id="kvtune_version")),
        ("Seed", placed(root.at("seed"), test_id="seed")),
        ("Budget", placed(root.at("budget_s"), "s", test_id="budget_s")),
        ("Took", placed(root.at("elapsed_s"), "s", test_id="elapsed_s")),
        ("Made", placed(root.at("created_at"), test_id="created_at")),
        ("The search ended because", placed(root.at("stop_reason"))),
    )
    again = "Redraw this page and its Markdown from the JSON alone:"
    return Section(
        "Repeat it",
        (
            Code(command if isinstance(command, str) else record.NOT_RECORDED, "command"),
            Facts(facts),
            Paragraph(again),
            Code("kvtune report result.json"),
        ),
    )


# ---------------------------------------------------------------- identity

_Row = tuple[str, tuple[str, ...], str]
_IDENTITY: Sequence[_Row] = (
    ("Model repository", ("identity", "model", "repo"), ""),
    ("Model folder", ("identity", "model", "path"), ""),
    ("Revision", ("identity", "model", "revision"), ""),
    ("Kind", ("identity", "model", "model_type"), ""),
    ("Weights, SHA-256", ("identity", "model", "weights_sha256"), ""),
    ("Config, SHA-256", ("identity", "model", "config_sha256"), ""),
    ("Tokenizer, SHA-256", ("identity", "model", "tokenizer_sha256"), ""),
    ("Chat template, SHA-256", ("identity", "model", "chat_template_sha256"), ""),
    ("Weights, stored as", ("identity", "model", "weight_dtypes"), ""),
    ("Computed in", ("identity", "model", "dtype"), ""),
    ("KV precision, baseline: keys", ("baseline", "effective", "k_codec"), ""),
    ("KV precision, baseline: values", ("baseline", "effective", "v_codec"), ""),
    ("KV precision, winner: keys", ("winner", "effective", "k_codec"), ""),
    ("KV precision, winner: values", ("winner", "effective", "v_codec"), ""),
    ("Runtime", ("identity", "engine", "name"), ""),
    ("Runtime version", ("identity", "engine", "version"), ""),
    ("torch", ("identity", "engine", "torch"), ""),
    ("Transformers", ("identity", "engine", "transformers"), ""),
    ("Kernel path", ("winner", "effective", "kernel"), ""),
    ("Read contract", ("winner", "effective", "read_contract"), ""),
    ("GPU", ("identity", "hardware", "gpus"), ""),
    ("GPU driver", ("identity", "hardware", "gpu_driver"), ""),
    ("CUDA", ("identity", "engine", "cuda"), ""),
    ("CPU", ("identity", "hardware", "cpu"), ""),
    ("Instruction sets", ("identity", "hardware", "isa"), ""),
    ("Cores", ("identity", "hardware", "num_cpus"), ""),
    ("Threads", ("identity", "hardware", "threads"), ""),
    ("Memory", ("identity", "hardware", "memory_bytes"), "bytes"),
    ("Disk, measured bandwidth", ("identity", "hardware", "disk"), ""),
    ("System", ("identity", "hardware", "system"), ""),
    ("Reference context, tokens", ("context",), ""),
    ("Longest sequence, tokens", ("identity", "model", "max_model_len"), ""),
    ("Batch: requests at once", ("winner", "effective", "max_num_seqs"), ""),
    ("Batch: tokens per step", ("winner", "effective", "max_num_batched_tokens"), ""),
    ("Block size", ("winner", "effective", "block_size"), ""),
    ("Workload file, SHA-256", ("workload", "sha256"), ""),
    ("Prompts as sent, SHA-256", ("workload", "prompts_sha256"), ""),
    ("Recipe", ("recipe",), ""),
)
_EMPTY_MEANS_NONE = frozenset(("GPU",))


def identity_section(result: Mapping[str, Any]) -> Section:
    """Everything another run must share to be the same run; what is missing says so."""
    root = Place(result)
    rows = tuple((label, _identity_cell(label, root.at(*keys), unit)) for label, keys, unit in _IDENTITY)
    return Section("Identity", (Facts(rows),))


def _identity_cell(label: str, place: Place, unit: str) -> Cell:
    items = as_sequence(place.value)
    if isinstance(place.value, list | tuple):
        text = ", ".join(show(item) for item in items)
        if not text and label in _EMPTY_MEANS_NONE:
            return Cell("none", pointer=place.pointer)
        return cell(text) if not text else Cell(text, pointer=place.pointer)
    return placed(place, unit, test_id="identity." + label.lower().replace(" ", "-"))


# ---------------------------------------------------------------- any mapping


def _lines(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    if isinstance(value, Mapping):
        return tuple(f"{name}: {show(item)}" for name, item in as_mapping(value).items())
    return tuple(show(item) for item in as_sequence(value))


def _all_facts(place: Place, left_out: frozenset[str]) -> Block:
    """Every leaf of a nested mapping as a labelled value, in the order recorded."""
    items = tuple(_leaves(place, "", left_out))
    if not items:
        text = show(place.value) if place.value and not as_mapping(place.value) else record.NOT_RECORDED
        return Paragraph(text, "muted")
    name = place.pointer.strip("/").replace("/", ".")
    return Facts(tuple((path, _leaf_cell(leaf, path, f"{name}.{path}")) for path, leaf in items))


def _leaf_cell(leaf: Place, path: str, test_id: str) -> Cell:
    items = as_sequence(leaf.value)
    if items and all(isinstance(item, str) for item in items):
        return Cell("; ".join(items), test_id=test_id, pointer=leaf.pointer)
    return placed(leaf, unit_of(path), test_id=test_id)


def _leaves(place: Place, path: str, left_out: frozenset[str]) -> list[tuple[str, Place]]:
    if not isinstance(place.value, Mapping):
        return [(path, place)] if path else []
    found: list[tuple[str, Place]] = []
    for key, inner in place.items():
        if key not in left_out:
            found += _leaves(inner, f"{path}.{key}" if path else key, left_out)
    return found
