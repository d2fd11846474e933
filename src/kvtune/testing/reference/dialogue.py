"""Drawn tasks as the reference model reads them: token ids of turns, and where the answers stand. No torch.

A dialogue is `<|bos|>` and its turns, each a role mark, the text and `<|end|>`: the model's chat template.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from kvtune.errors import UsageError
from kvtune.quality import Material, Sample

__all__ = [
    "BOS",
    "END",
    "PAD",
    "ROLES",
    "SPECIALS",
    "Dialogue",
    "DialogueEncoder",
    "material",
    "single_token_words",
]

SPECIALS: Final = ("<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
"""Special tokens; the index is the token id."""
PAD, BOS, END = 0, 1, 2
ROLES: Final[Mapping[str, int]] = MappingProxyType({"system": 3, "user": 4, "assistant": 5})
_SHORTEST_WORD: Final = 4


@dataclass(frozen=True, slots=True)
class Dialogue:
    """Token ids of a sample's turns; `answers`: positions [start, end) of each scored answer with its end
    mark, in the order asked."""

    token_ids: tuple[int, ...]
    answers: tuple[tuple[int, int], ...]

    @property
    def prompt(self) -> tuple[int, ...]:
        """Up to the first scored answer, its role mark included."""
        return self.token_ids[: self.answers[0][0]]

    @property
    def continuation(self) -> tuple[int, ...]:
        """From the first scored answer to the end of the last."""
        return self.token_ids[self.answers[0][0] : self.answers[-1][1]]

    def is_answered(self, greedy: Sequence[int]) -> list[bool]:
        """Per scored answer, whether greedy decoding gives it: `greedy` [len(continuation)] holds the most
        likely token after each true text, and an answer whose every token is that one is what decoding,
        token by token from the model's own, would have written."""
        first = self.answers[0][0]
        return [
            tuple(greedy[start - first : end - first]) == self.token_ids[start:end]
            for start, end in self.answers
        ]


class DialogueEncoder:
    """Encodes turns with a tokenizer that has the reference model's special tokens.

    `tokenizer`: a fast Transformers tokenizer. UsageError if its special tokens are others.
    """

    def __init__(self, tokenizer: Any) -> None:
        found = tuple(tokenizer.convert_ids_to_tokens(range(len(SPECIALS))))
        if found != SPECIALS:
            raise UsageError(
                f"tasks are put to models with the special tokens {' '.join(SPECIALS)}, found {found}; "
                "use a model that tools/train_reference.py trained"
            )
        self._encode: Callable[[str], Any] = tokenizer.backend_tokenizer.encode

    def text(self, text: str) -> list[int]:
        """Token ids of plain text."""
        return self._encode(text).ids

    def count(self, text: str) -> int:
        return len(self.text(text))

    def turns(self, turns: Iterable[tuple[str, str]]) -> list[list[int]]:
        """Per (role, content) turn: role mark, text, end mark. Equals the chat template after BOS."""
        return [[ROLES[role], *self.text(content), END] for role, content in turns]

    def dialogue(self, sample: Sample) -> Dialogue:
        token_ids = [BOS]
        starts: list[int] = []
        for turn in self.turns(sample.turns):
            starts.append(len(token_ids))
            token_ids += turn
        starts.append(len(token_ids))
        answers = tuple((starts[index] + 1, starts[index + 1]) for index in sample.scored)
        return Dialogue(tuple(token_ids), answers)


def material(tokenizer: Any, filler: Sequence[str]) -> Material:
    """What tasks are made of for this tokenizer: its one-token words, its own count of tokens."""
    return Material(single_token_words(tokenizer), filler, DialogueEncoder(tokenizer).count)


def single_token_words(tokenizer: Any) -> list[str]:
    """English-looking words that are one token after a space, in order of token id."""
    by_id = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return [token[1:] for token, index in by_id if index >= len(SPECIALS) and _is_word(token)]


def _is_word(token: str) -> bool:
    word = token[1:]
    return (
        token[0] == "Ġ"
        and len(word) >= _SHORTEST_WORD
        and word.isascii()
        and word.isalpha()
        and word.islower()
    )
