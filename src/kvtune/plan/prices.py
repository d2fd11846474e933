"""The user's own price file. kvtune brings no prices: they change by week, region and contract."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from kvtune.config import parse_bytes
from kvtune.errors import InputFileError, UsageError
from kvtune.plan.hardware import GPU, find_gpu

__all__ = ["read_prices"]

_MAX_BYTES = 1 << 20
_MAX_PRICE = 1e9


def read_prices(path: Path) -> list[tuple[GPU, float]]:
    """Cards and what one of them costs, in whatever unit the file uses throughout.

    CSV with the columns `gpu` and `price` and, for a card no table knows, `memory` (80GiB); or a JSON object
    of name -> price. InputFileError, with the line or the name, for anything else.
    """
    text = _text(path)
    rows = _json_rows(path, text) if text.lstrip().startswith("{") else _csv_rows(path, text)
    if not rows:
        raise InputFileError(f"{path}: no prices found; expected a CSV with columns gpu,price")
    return rows


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise InputFileError(f"{path}: larger than {_MAX_BYTES >> 20} MiB: not a price file")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputFileError(f"{path}: {error.strerror or error}: expected a price file") from None
    except ValueError:  # not UTF-8, a NUL byte in the name
        raise InputFileError(f"{path}: not a text file: expected a CSV with columns gpu,price") from None


def _json_rows(path: Path, text: str) -> list[tuple[GPU, float]]:
    try:
        prices = cast(Mapping[str, Any], json.loads(text))
    except (ValueError, RecursionError) as error:
        raise InputFileError(f"{path}: not JSON: {str(error)[:80]}") from None
    return [_row(f"{path}", name, str(price), "") for name, price in prices.items()]


def _csv_rows(path: Path, text: str) -> list[tuple[GPU, float]]:
    reader = csv.DictReader(io.StringIO(text), skipinitialspace=True)
    try:
        columns = {name.strip().lower(): name for name in reader.fieldnames or () if name}
        if not {"gpu", "price"} <= columns.keys():
            raise InputFileError(f"{path}: expected the columns gpu,price, found {ascii(list(columns))[:80]}")
        memory = columns.get("memory")
        return [
            _row(
                f"{path}: line {reader.line_num}",
                row[columns["gpu"]] or "",
                row[columns["price"]] or "",
                (row[memory] or "") if memory else "",
            )
            for row in reader
        ]
    except csv.Error as error:
        raise InputFileError(f"{path}: line {reader.line_num}: not CSV: {error}") from None


def _row(where: str, name: str, price: str, memory: str) -> tuple[GPU, float]:
    try:
        value = float(price)
    except ValueError:
        value = math.nan
    if not 0 < value <= _MAX_PRICE:
        raise InputFileError(
            f"{where}: the price of {name[:40]!r} must be a number above 0, found {price[:40]!r}"
        )
    try:
        gpu = GPU(name=name.strip(), memory_bytes=parse_bytes(memory.strip())) if memory.strip() else None
        return gpu or find_gpu(name), value
    except UsageError as error:
        raise InputFileError(f"{where}: {error}") from None
