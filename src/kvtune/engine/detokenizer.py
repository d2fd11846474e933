"""Text of a growing token list, a few tokens at a time, and stop strings found across token borders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

__all__ = ["Detokenizer", "TokenDecoder"]

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TokenDecoder(Protocol):
    """The two tokenizer methods generation needs."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str: ...

    def encode(self, text: str) -> list[int]: ...


class Detokenizer:
    """Turns one request's tokens into text and looks for its stop strings.

    `text` is final: it never takes a character back. Held back are an unfinished UTF-8 character and,
    while the request runs, the longest tail that could be the beginning of a stop string. Decoding
    starts from a sliding offset, because a token's text depends on its left neighbour (leading
    spaces, byte fallback): the method of vLLM's and TGI's incremental detokenisation.
    """

    def __init__(self, decoder: TokenDecoder | None, stop: Sequence[str]) -> None:
        self._decoder = decoder
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._prefix = 0
        """Tokens before this give only context; text up to `_read` was emitted."""
        self._read = 0
        self._held = ""
        self.text = ""
        self.is_stopped = False

    def append(self, token_ids: Sequence[int], *, is_last: bool) -> str:
        """Add tokens and return the text that became final. After a stop string nothing is added.

        `is_last`: the request has ended, nothing is held back any more.
        """
        if self._decoder is None or self.is_stopped:
            return ""
        self._ids.extend(token_ids)
        self._held += self._decode_new(flush=is_last)
        return self._release(is_last)

    def _decode_new(self, *, flush: bool) -> str:
        assert self._decoder is not None
        context = self._decoder.decode(self._ids[self._prefix : self._read], skip_special_tokens=True)
        full = self._decoder.decode(self._ids[self._prefix :], skip_special_tokens=True)
        if full.endswith(_REPLACEMENT) and not flush:
            return ""  # the bytes of one character are still arriving
        self._prefix, self._read = self._read, len(self._ids)
        return full[len(context) :]

    def _release(self, is_last: bool) -> str:
        found = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            new, self._held = self._held[: min(found)], ""
        else:
            keep = 0 if is_last else self._possible_stop_tail()
            cut = len(self._held) - keep
            new, self._held = self._held[:cut], self._held[cut:]
        self.text += new
        return new

    def _possible_stop_tail(self) -> int:
        """Length of the longest tail of the held text that begins some stop string."""
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:length]):
                    longest = length
                    break
        return longest
