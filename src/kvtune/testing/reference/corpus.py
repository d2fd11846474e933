"""Text every machine has: the sources and docstrings of the running Python's standard library. No torch.

Held-out files are chosen by a hash of their path, so that training and measuring always agree on them.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_SKIPPED = frozenset(
    {"site-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "turtledemo", "__pycache__"}
)
_HELD_OUT_SHARE = 20  # one file in twenty
_MIN_DOC_CHARS = 40


@dataclass(frozen=True, slots=True)
class DocumentedName:
    """A function or class with the first sentence of its docstring and its source."""

    name: str
    summary: str
    source: str


@dataclass(frozen=True, slots=True)
class Corpus:
    """Sources, prose (docstrings and the language reference) and documented names of one split."""

    sources: tuple[str, ...]
    prose: tuple[str, ...]
    names: tuple[DocumentedName, ...]


def is_held_out(relative_path: str) -> bool:
    """True for the twentieth of the files that training never reads."""
    digest = hashlib.sha256(relative_path.encode()).digest()
    return digest[0] % _HELD_OUT_SHARE == 0


def load_corpus(*, held_out: bool) -> Corpus:
    """Read one split of the standard library of the running interpreter."""
    sources: list[str] = []
    prose: list[str] = []
    names: list[DocumentedName] = []
    for relative, text in _files():
        if is_held_out(relative) is not held_out:
            continue
        sources.append(text)
        for name, doc, source in _documented(text):
            if len(doc) >= _MIN_DOC_CHARS:
                prose.append(doc)
            summary = " ".join(doc.split("\n\n")[0].split())
            if name and 10 < len(summary) <= 120 and len(source) <= 2500:
                names.append(DocumentedName(name, summary, source))
    return Corpus(tuple(sources), tuple(prose), tuple(names))


def _files() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED.isdisjoint(relative.parts):
            try:
                yield relative.as_posix(), path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue  # a deliberately badly encoded fixture


def _documented(text: str) -> Iterator[tuple[str, str, str]]:
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return
    lines = text.splitlines()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        doc = ast.get_docstring(node)
        if not doc:
            continue
        if isinstance(node, ast.Module):
            yield "", doc, ""
        else:
            yield node.name, doc, "\n".join(lines[node.lineno - 1 : node.end_lineno])
