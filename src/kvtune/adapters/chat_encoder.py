"""A model folder's chat template as probes need it: token ids of a dialogue and where its answers stand."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from kvtune.adapters.prompt_encoder import load_tokenizer

__all__ = ["ChatEncoder", "chat_encoder"]

MAX_WORDS = 2000
"""Of a large vocabulary the first: merges that were learnt early are whole, frequent words."""
SHORTEST_WORD = 4
WORD_MARKS = ("Ġ", "▁")
"""How byte-level and SentencePiece vocabularies write the space before a word."""

_FALLBACK_WORDS: Sequence[str] = tuple(
    word
    for line in (
        "river stone cloud garden window market silver yellow mountain forest copper winter summer engine",
        "candle mirror pocket basket hammer ladder pencil carpet bottle button island valley harbor temple",
        "violin guitar trumpet piano drum rabbit falcon tiger turtle spider salmon parrot monkey donkey",
        "orange banana cherry lemon pepper garlic onion tomato potato carrot butter cheese honey sugar",
        "paper cotton leather marble velvet anchor rocket saddle shovel castle bridge camel coffee",
    )
    for word in line.split()
)


class ChatEncoder:
    """Dialogues through one tokenizer's chat template. `words`: what tasks are made of, one token each where
    the vocabulary has enough of them."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(int(i) for i in tokenizer.all_special_ids)
        self.words: Sequence[str] = _words(tokenizer)
        # what templates raise by themselves: roles that do not alternate, no system message
        self._template_error: type[Exception] = importlib.import_module("jinja2.exceptions").TemplateError
        self._has_system = self._template([("system", "a"), ("user", "b")], ask=True) is not None

    def count(self, text: str) -> int:
        """Tokens of plain text."""
        return len(self._tokenizer.encode(text, add_special_tokens=False))

    def text(self, token_ids: Sequence[int]) -> str:
        """What a user reads of an answer: special tokens left out."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def dialogue(
        self, turns: Sequence[tuple[str, str]], scored: Sequence[int]
    ) -> tuple[list[int], list[tuple[int, int]]] | None:
        """Token ids of the turns up to the last scored one, and [start, end) of each scored answer with its
        end mark. None where the template refuses the turns or writes earlier turns differently later on:
        then a question's prompt is no prefix of the next one's, and one pass cannot score both.
        """
        turns = turns if self._has_system else _without_system(turns)
        scored = scored if self._has_system else [i - 1 for i in scored]
        whole = self._template(turns[: scored[-1] + 1], ask=False)
        if whole is None:
            return None
        spans: list[tuple[int, int]] = []
        for index in scored:
            prompt = self._template(turns[:index], ask=True)
            answered = self._template(turns[: index + 1], ask=False)
            if prompt is None or answered is None or len(prompt) >= len(answered):
                return None
            if whole[: len(prompt)] != prompt or whole[: len(answered)] != answered:
                return None
            spans.append((len(prompt), self._end(answered, len(prompt))))
        return whole[: spans[-1][1]], spans

    def _end(self, token_ids: Sequence[int], start: int) -> int:
        """After the first special token from `start` on: what templates write behind, no model generates."""
        for index in range(start, len(token_ids)):
            if token_ids[index] in self._special:
                return index + 1
        return len(token_ids)

    def _template(self, turns: Sequence[tuple[str, str]], *, ask: bool) -> list[int] | None:
        messages = [{"role": role, "content": content} for role, content in turns]
        try:
            found: Any = self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=ask, tokenize=True
            )
        except (self._template_error, TypeError):
            return None
        if isinstance(found, Mapping):
            found = cast("Mapping[str, Any]", found)["input_ids"]
        return [int(token) for token in found]


def chat_encoder(folder: Path) -> ChatEncoder | None:
    """None without a tokenizer or a chat template. Errors as `prompt_encoder`'s."""
    tokenizer = load_tokenizer(folder)
    if tokenizer is None or not tokenizer.chat_template:
        return None
    return ChatEncoder(tokenizer)


def _without_system(turns: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The system prompt in front of the first question, for templates that know no system turn."""
    if not turns or turns[0][0] != "system":
        return list(turns)
    (_, system), (role, content), *rest = turns
    return [(role, f"{system}\n\n{content}"), *rest]


def _words(tokenizer: Any) -> list[str]:
    by_id = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    words = [token[1:] for token, _ in by_id if token[:1] in WORD_MARKS and _is_word(token[1:])]
    return words[:MAX_WORDS] if len(words) >= len(_FALLBACK_WORDS) else list(_FALLBACK_WORDS)


def _is_word(word: str) -> bool:
    return len(word) >= SHORTEST_WORD and word.isascii() and word.isalpha() and word.islower()
