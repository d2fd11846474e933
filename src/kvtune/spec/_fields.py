"""Bounded, typed reads of a model config: nothing is allocated from a value before it passed here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from kvtune.errors import UnsupportedModelError

__all__ = ["Fields", "show"]

MAX_LAYERS = 4096
MAX_HEADS = 1 << 16
MAX_DIM = 1 << 20
MAX_TOKENS = 1 << 31
_SHOWN_CHARS = 60


def show(value: object) -> str:
    """A hostile value in at most one short line: sizes of containers and huge integers, never their text."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, (bool, int, float)) or value is None:
        return repr(value)
    if isinstance(value, str):
        return repr(value if len(value) <= _SHOWN_CHARS else value[:_SHOWN_CHARS] + "...")
    return f"a {type(value).__name__}"


class Fields:
    """Reads of one config dict. Every failure is an UnsupportedModelError that names field and value.

    `aliases` maps the name we ask for to the family's own name, or to several, tried in order; a name with
    a dot lies in a nested dict. `defaults` holds the values that the family's published config files leave
    out (keyed by the name we ask for).
    """

    def __init__(
        self,
        raw: Mapping[str, Any],
        *,
        aliases: Mapping[str, str | tuple[str, ...]] | None = None,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        self._raw = raw
        self._aliases = aliases or {}
        self._defaults = defaults or {}

    def name(self, field: str) -> str:
        """The field's name in this config, for messages."""
        own = self._own_names(field)
        return next((name for name in own if self._holds(name)), own[0] if own else field)

    def get(self, field: str) -> Any:
        """The raw value: under its own name, else one of the family, else its default, else None."""
        for name in (field, *self._own_names(field)):
            holder, key = self._inside(name)
            if key in holder:
                return holder[key]
        return self._defaults.get(field)

    def _own_names(self, field: str) -> tuple[str, ...]:
        if field in self._raw:
            return (field,)
        names = self._aliases.get(field, ())
        return (names,) if isinstance(names, str) else names

    def _holds(self, name: str) -> bool:
        holder, key = self._inside(name)
        return key in holder

    def _inside(self, name: str) -> tuple[Mapping[str, Any], str]:
        """The dict a name lies in and its key there; a nested dict that is missing or none is empty."""
        outer, dot, key = name.partition(".")
        if not dot:
            return self._raw, name
        holder = self._raw.get(outer)
        return (cast(Mapping[str, Any], holder) if isinstance(holder, Mapping) else {}), key

    def optional(self, field: str, high: int, *, low: int = 1) -> int | None:
        """A whole number in [low, high], or None where the field is absent or null."""
        value = self.get(field)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise UnsupportedModelError(
                f"config field {self.name(field)!r}: expected a whole number from {low} to {high}, "
                f"found {show(value)}"
            )
        return value

    def number(self, field: str, high: int, *, low: int = 1) -> int:
        """A required whole number in [low, high]."""
        value = self.optional(field, high, low=low)
        if value is None:
            raise UnsupportedModelError(
                f"config field {self.name(field)!r} is missing: expected a whole number from {low} to {high}"
            )
        return value

    def flag(self, field: str) -> bool:
        """True or False; absent and null are False."""
        value = self.get(field)
        if value is not None and not isinstance(value, bool):
            raise UnsupportedModelError(
                f"config field {self.name(field)!r}: expected true or false, found {show(value)}"
            )
        return bool(value)

    def text(self, field: str) -> str | None:
        """A string, or None where the field is absent or null."""
        value = self.get(field)
        if value is not None and not isinstance(value, str):
            raise UnsupportedModelError(
                f"config field {self.name(field)!r}: expected a string, found {show(value)}"
            )
        return value

    def sequence(self, field: str) -> Sequence[Any] | None:
        """A list of at most MAX_LAYERS entries, or None where the field is absent or null."""
        value = self.get(field)
        if value is None:
            return None
        if not isinstance(value, (list, tuple)):
            raise UnsupportedModelError(
                f"config field {self.name(field)!r}: expected a list, found {show(value)}"
            )
        entries = cast(Sequence[Any], value)
        if len(entries) > MAX_LAYERS:
            raise UnsupportedModelError(
                f"config field {self.name(field)!r}: expected at most {MAX_LAYERS} layers, "
                f"found {len(entries)}"
            )
        return entries
