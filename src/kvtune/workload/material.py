"""Text every machine has: documentation and source code of Python's standard library.

The same for one Python version and build, so generated workloads are reproducible without a download.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any, Final

__all__ = ["Passage", "collect_passages"]

_MODULES: Final = (
    "argparse", "ast", "asyncio.locks", "asyncio.queues", "base64", "bisect", "calendar", "codecs",
    "collections", "concurrent.futures", "configparser", "contextlib", "copy", "csv", "dataclasses",
    "datetime", "decimal", "difflib", "dis", "email.utils", "enum", "fileinput", "fnmatch", "fractions",
    "functools", "getpass", "gettext", "glob", "gzip", "hashlib", "heapq", "hmac", "html", "http.client",
    "imaplib", "inspect", "ipaddress", "json", "linecache", "locale", "logging", "lzma", "mailbox",
    "mimetypes", "numbers", "operator", "optparse", "os", "pathlib", "pickletools", "pkgutil", "plistlib",
    "pprint", "queue", "random", "re", "reprlib", "sched", "secrets", "selectors", "shelve", "shlex",
    "shutil", "signal", "smtplib", "socket", "statistics", "string", "struct", "subprocess", "tarfile",
    "tempfile", "textwrap", "threading", "timeit", "tokenize", "traceback", "types",
    "urllib.parse", "urllib.request", "uuid", "warnings", "wave", "weakref", "xml.etree.ElementTree",
    "zipfile", "zlib",
)  # fmt: skip
"""Modules whose import has no side effect beyond loading."""

_MIN_CHARACTERS: Final = 80
_MAX_CHARACTERS: Final = 6000
_SENTENCE_END = re.compile(r"(?<=[.!?])\s")


@dataclass(frozen=True, slots=True)
class Passage:
    """One documented thing. `name` is dotted; `code` is its source, "" where there is none at hand."""

    name: str
    module: str
    parameters: tuple[str, ...]
    text: str
    code: str

    @property
    def sentence(self) -> str:
        """The first sentence of the documentation, on one line."""
        return _SENTENCE_END.split(" ".join(self.text.split()), maxsplit=1)[0]

    @property
    def opening(self) -> str:
        """The first paragraphs, at most about 500 characters."""
        paragraphs = self.text.split("\n\n")
        opening = paragraphs[0]
        for paragraph in paragraphs[1:]:
            if len(opening) + len(paragraph) > 500:
                break
            opening += "\n\n" + paragraph
        return opening[:800]


def collect_passages() -> tuple[Passage, ...]:
    """All passages found, by module and name. Modules this Python lacks are passed over; where
    documentation was stripped (`python -OO`) a module's list of names stands in for it."""
    passages: list[Passage] = []
    for name in _MODULES:
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        passages += _of_module(module) or [_names_of(module)]
    return tuple(passages)


def _of_module(module: ModuleType) -> list[Passage]:
    return [passage for name, thing in _documented(module) if (passage := _passage(module, name, thing))]


def _documented(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """(dotted name, object) of the public functions, classes and methods a module defines itself: other
    libraries hang things on standard modules and classes, and the text must not depend on them."""
    yield module.__name__, module
    for name, thing in sorted(vars(module).items()):
        if name.startswith("_") or getattr(thing, "__module__", None) != module.__name__:
            continue
        if isinstance(thing, type):
            yield f"{module.__name__}.{name}", thing
            for method, body in sorted(vars(thing).items()):
                is_own = isinstance(body, FunctionType) and body.__module__ == module.__name__
                if is_own and not method.startswith("_"):
                    yield f"{module.__name__}.{name}.{method}", body
        elif callable(thing):
            yield f"{module.__name__}.{name}", thing


def _passage(module: ModuleType, name: str, thing: Any) -> Passage | None:
    # Only the object's own words: inspect.getdoc would repeat what a base class says.
    words = getattr(thing, "__doc__", None)
    text = inspect.cleandoc(words) if isinstance(words, str) else ""
    # An address in a text would differ from run to run.
    if not _MIN_CHARACTERS <= len(text) <= _MAX_CHARACTERS or " at 0x" in text:
        return None
    code = _source(thing) if isinstance(thing, FunctionType) else ""
    return Passage(name, module.__name__, _parameters(thing), text, code)


def _parameters(thing: Any) -> tuple[str, ...]:
    if not callable(thing):
        return ()
    try:
        return tuple(inspect.signature(thing).parameters)
    except (TypeError, ValueError):
        return ()


def _source(thing: FunctionType) -> str:
    try:
        code = inspect.getsource(thing)
    except (OSError, TypeError):
        return ""
    return inspect.cleandoc("\n" + code) if len(code) <= _MAX_CHARACTERS else ""


def _names_of(module: ModuleType) -> Passage:
    # `vars` would also list what has been loaded lazily so far.
    names = getattr(module, "__all__", None) or [
        name for name, thing in vars(module).items() if getattr(thing, "__module__", None) == module.__name__
    ]
    text = f"The module {module.__name__} defines these names: {', '.join(sorted(names))}."
    return Passage(module.__name__, module.__name__, (), text[:_MAX_CHARACTERS], "")
