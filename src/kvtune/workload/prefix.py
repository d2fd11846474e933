"""Which requests begin alike: the prefix tree over whatever units a request's prompt is made of."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Final

from kvtune.workload.request import WorkloadRequest

__all__ = ["PrefixTree", "prefix_units", "session_labels"]

TOKENS_PER_UNIT: Final = 32
CHARACTERS_PER_UNIT: Final = 64
"""About one block of 16 tokens of English text."""

_MIN_HUB_CHILDREN: Final = 8
_HUB_SHARE: Final = 20


class PrefixTree:
    """Numbers prefixes: equal paths of units from the same root have equal nodes, others never do.

    Nodes count from 0 in order of first appearance, so a parent's number is below its children's.
    """

    def __init__(self) -> None:
        self._nodes: dict[tuple[Hashable, Hashable], int] = {}
        self.parents: list[int] = []
        """Per node the parent's number, -1 below a root."""

    def add(self, units: Iterator[Hashable] | Sequence[Hashable], *, salt: str = "") -> list[int]:
        """The node of every prefix of `units`, shortest first; unknown ones are created."""
        path: list[int] = []
        parent: int | str = salt
        for unit in units:
            node = self._nodes.setdefault((parent, unit), len(self._nodes))
            if node == len(self.parents):
                self.parents.append(parent if isinstance(parent, int) else -1)
            path.append(node)
            parent = node
        return path

    def __len__(self) -> int:
        return len(self._nodes)


def prefix_units(request: WorkloadRequest) -> Iterator[Hashable]:
    """A prompt cut into units that can be shared: hash ids, messages, runs of tokens or of characters.

    Nothing for a request of which only the length is known.
    """
    if request.token_ids is not None:
        ids = request.token_ids
        yield from (ids[i : i + TOKENS_PER_UNIT] for i in range(0, len(ids), TOKENS_PER_UNIT))
    elif request.messages:
        yield from request.messages
    elif request.prompt is not None:
        text = request.prompt
        yield from (text[i : i + CHARACTERS_PER_UNIT] for i in range(0, len(text), CHARACTERS_PER_UNIT))
    elif request.hash_ids is not None:
        yield from request.hash_ids


def session_labels(requests: Sequence[WorkloadRequest]) -> list[str]:
    """One label per request: its session, or, where the file names none, the conversation its prefix
    shows: requests that share more than a common system prompt have one label.

    A prefix with more than max(8, 5 % of the requests) different continuations is taken for a system
    prompt, and so is everything before it.
    """
    tree = PrefixTree()
    paths = [
        [] if request.session_id else tree.add(prefix_units(request), salt=request.cache_salt)
        for request in requests
    ]
    is_common = _common_nodes(tree, max(_MIN_HUB_CHILDREN, len(requests) // _HUB_SHARE))
    labels: list[str] = []
    for request, path in zip(requests, paths, strict=True):
        own = next((node for node in path if not is_common[node]), None)
        labels.append(request.session_id or (request.request_id if own is None else f"prefix-{own}"))
    return labels


def _common_nodes(tree: PrefixTree, max_children: int) -> list[bool]:
    num_children = [0] * len(tree)
    for parent in tree.parents:
        if parent >= 0:
            num_children[parent] += 1
    is_common = [count > max_children for count in num_children]
    for node in reversed(range(len(tree))):  # children before parents
        if is_common[node] and tree.parents[node] >= 0:
            is_common[tree.parents[node]] = True
    return is_common
