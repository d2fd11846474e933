"""One record of a workload file with typed, checked access to its fields; errors name the line."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final, NoReturn, cast

from kvtune.errors import InputFileError

__all__ = ["Row", "decode_json"]

_DATE: Final = re.compile(r"(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d:\d\d)(\.\d{1,9})?(Z|[+-]\d\d:\d\d)?", re.ASCII)
MAX_INTEGER: Final = 2**63 - 1
MAX_TOKENS: Final = 2**30
"""No model reads or writes more tokens in one request; lengths beyond are damage, and would size arrays."""


@dataclass(frozen=True, slots=True)
class Row:
    """A JSON object or a CSV line (column name -> text) with the place it came from.

    Every getter raises InputFileError, naming file, line and field, when a value has the wrong type or
    range. `null` counts as absent.
    """

    path: Path
    line: int
    fields: Mapping[str, Any]

    def fail(self, message: str) -> NoReturn:
        raise InputFileError(f"{self.path}, line {self.line}: {message}")

    def integer(self, name: str, *, low: int = -MAX_INTEGER, default: int | None = None) -> int:
        """A whole number in [low, 2**63); required unless `default` is given."""
        value = self.optional_integer(name, low=low)
        if value is not None:
            return value
        return default if default is not None else self._missing(name)

    def optional_integer(self, name: str, *, low: int = -MAX_INTEGER) -> int | None:
        value = self.fields.get(name)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= MAX_INTEGER:
            bound = f" of at least {low}" if low > -MAX_INTEGER else ""
            self.fail(f"'{name}' must be a whole number{bound}, found {_shown(value)}")
        return value

    def number(self, name: str, *, default: float | None = None) -> float:
        """A finite number; text that spells one is accepted (some traces quote their timestamps)."""
        value = self.fields.get(name)
        if value is None:
            return default if default is not None else self._missing(name)
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            self.fail(f"'{name}' must be a finite number, found {_shown(value)}")
        return number

    def time(self, name: str, *, default: float | None = None) -> float:
        """A number of at least 0: a time since some start."""
        number = self.number(name, default=default)
        if number < 0:
            self.fail(f"'{name}' must be a time of at least 0, found {number:g}")
        return number

    def date(self, name: str) -> float:
        """A written time, as seconds since 1970 (UTC where no zone is said). Up to 9 decimals, more than
        datetime keeps: Azure's traces have 7."""
        text = self.text(name)
        match = _DATE.fullmatch(text.strip())
        try:
            if match is None:
                raise ValueError(text)
            zone = (match[4] or "+00:00").replace("Z", "+00:00")
            whole = datetime.fromisoformat(f"{match[1]}T{match[2]}{zone}").timestamp()
        except (ValueError, OverflowError):
            self.fail(f"'{name}' must be a time such as 2023-11-16 18:15:46.68, found {_shown(text)}")
        return whole + float(match[3] or 0)

    def tokens(self, name: str) -> int:
        """A number of tokens, 0 to 2**30; text that spells one is accepted (CSV)."""
        value = self.optional_tokens(name)
        return self._missing(name) if value is None else value

    def optional_tokens(self, name: str) -> int | None:
        if self.fields.get(name) is None:
            return None
        number = self.number(name)
        if number != int(number) or not 0 <= number <= MAX_TOKENS:
            found = _shown(self.fields[name])
            self.fail(f"'{name}' must be a whole number of tokens, 0 to {MAX_TOKENS}, found {found}")
        return int(number)

    def text(self, name: str, *, default: str | None = None) -> str:
        """A string."""
        value = self.fields.get(name)
        if value is None:
            return default if default is not None else self._missing(name)
        if not isinstance(value, str):
            self.fail(f"'{name}' must be text, found {_shown(value)}")
        return value

    def identifier(self, name: str, *, default: str | None = None) -> str:
        """A string, or a whole number that serves as a name."""
        value = self.fields.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) <= MAX_INTEGER:
            return str(value)
        return self.text(name, default=default)

    def integers(self, name: str, *, low: int = -MAX_INTEGER) -> tuple[int, ...]:
        """A list of whole numbers of at least `low`."""
        for value in self.items(name):
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= MAX_INTEGER:
                self.fail(f"'{name}' must hold whole numbers of at least {low}, found {_shown(value)}")
        return tuple(self.items(name))

    def items(self, name: str) -> Sequence[Any]:
        """A list of anything."""
        value = self.fields.get(name)
        if value is None:
            self._missing(name)
        if not isinstance(value, list):
            self.fail(f"'{name}' must be a list, found {_shown(value)}")
        return cast("list[Any]", value)

    def rows(self, name: str) -> list[Row]:
        """A list of objects, each as a Row of the same line."""
        return [self._object(f"{name}[{i}]", value) for i, value in enumerate(self.items(name))]

    def row(self, name: str) -> Row:
        """A nested object."""
        value = self.fields.get(name)
        return self._missing(name) if value is None else self._object(name, value)

    def _object(self, name: str, value: Any) -> Row:
        if not isinstance(value, dict):
            self.fail(f"'{name}' must be an object, found {_shown(value)}")
        return Row(self.path, self.line, cast("dict[str, Any]", value))

    def _missing(self, name: str) -> NoReturn:
        self.fail(f"'{name}' is missing; found {_shown(sorted(self.fields))}")


def decode_json(path: Path, line: int, text: str) -> Any:
    """The value of one line of JSON. NaN and Infinity are refused: they are not JSON.

    Raises InputFileError with line (and column), also for nesting too deep and numbers too long.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise InputFileError(
            f"{path}, line {line + error.lineno - 1}: malformed JSON: {error.msg} (column {error.colno})"
        ) from None
    except (ValueError, RecursionError) as error:
        raise InputFileError(f"{path}, line {line}: malformed JSON: {_one_line(error)}") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _one_line(error: Exception) -> str:
    return str(error).splitlines()[0].split(";")[0] if str(error) else type(error).__name__


def _shown(value: Any) -> str:
    # ascii() keeps control characters and lone surrogates out of a terminal.
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."
