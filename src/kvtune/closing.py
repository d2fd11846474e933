"""What `with` means for anything that runs until it is closed."""

from __future__ import annotations

from typing import Self

__all__ = ["Closing"]


class Closing:
    """Base of a class with an idempotent `close`: leaving the `with` block closes it, whatever happened."""

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
