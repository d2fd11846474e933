"""A model folder's tokenizer and chat template as the function `workload.materialise` wants."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from kvtune.errors import InputFileError, MissingExtraError, UsageError
from kvtune.model_folder import has_tokenizer
from kvtune.workload import WorkloadRequest

__all__ = ["load_tokenizer", "prompt_encoder"]


def load_tokenizer(folder: Path) -> Any | None:
    """The folder's Transformers tokenizer; None where it has none.

    InputFileError for a tokenizer that cannot be read, MissingExtraError without Transformers.
    """
    if not has_tokenizer(folder):
        return None
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError:
        raise MissingExtraError(f"reading the tokenizer of {folder}", "engine") from None
    wrong_config: type[Exception] = importlib.import_module("huggingface_hub.errors").StrictDataclassError
    try:
        return transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError, wrong_config) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputFileError(f"cannot read the tokenizer in {folder}: {reason}") from error


def prompt_encoder(folder: Path) -> Callable[[WorkloadRequest], list[int]] | None:
    """Token ids of a request's messages (through the chat template) or prompt; None without a tokenizer.

    Errors as `load_tokenizer`'s.
    """
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        return None

    # what templates raise by themselves: roles that do not alternate, no system message, wrong syntax
    template_error: type[Exception] = importlib.import_module("jinja2.exceptions").TemplateError

    def encode(request: WorkloadRequest) -> list[int]:
        if not request.messages:
            return [int(token) for token in tokenizer.encode(request.prompt or "")]
        if not tokenizer.chat_template:
            raise UsageError(f"{folder} has no chat template, so chat messages cannot be sent to it")
        messages = [{"role": m.role, "content": m.content} for m in request.messages]
        try:
            found: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
        except (template_error, TypeError) as error:
            reason = " ".join(str(error).split())
            raise UsageError(f"the chat template refuses these messages: {reason}") from error
        if isinstance(found, Mapping):
            found = cast("Mapping[str, Any]", found)["input_ids"]
        return [int(token) for token in found]

    return encode
