"""Hazard eviction: the block with the lowest learned rate of hits for the room it takes leaves first.

Each class of blocks keeps its candidates in the order of their last use. Within a class the one used longest
ago scores lowest, so the victim is the lowest of the classes' fronts. The clock counts block references; no
wall clock sways a decision. A block's class is made of

- the children it was given so far: none, one, more;
- its uses: 1, 2, 3-4, 5-8, more;
- the gap: the age of the deepest block of its request that was still known, in eight steps relative to the
  capacity (0: none was known).

Evicted blocks are remembered, 8 capacities of them: a return counts as the use it is, and uses outlive an
eviction. Until something is learned all classes score alike, and the order is LRU's. `Survival` says how
scores are learned; csrc/hazard_order.h is the twin.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable, Sequence
from typing import Final

from kvtune.cache.eviction_survival import CLASS_LEVELS, NUM_AGES, NUM_CLASSES, Survival
from kvtune.cache.eviction_tree import TreeBlock, TreePolicy
from kvtune.types import BlockId

__all__ = ["Hazard"]

_GHOSTS: Final = 8  # evicted blocks remembered, in capacities
_MOST: Final = 255  # counters stop here
_USES: Final = (0, 0, 1, 2, 2, 3, 3, 3, 3)  # level of so many uses; beyond: 4
_NONE: Final = float("inf")


class _Release:
    """Blocks of one class released at one time: one observation of a survival curve."""

    __slots__ = ("block_class", "num_unused", "time")

    def __init__(self, time: int, block_class: int) -> None:
        self.time = time
        self.block_class = block_class
        self.num_unused = 0  # blocks not used since and not forgotten


class _Block(TreeBlock):
    """What is known about a block, resident or remembered."""

    __slots__ = ("block_id", "content", "gap", "num_children_seen", "queue", "queued", "release", "uses")

    def __init__(self, content: Hashable) -> None:
        super().__init__()
        self.content = content
        self.block_id = BlockId(-1)  # while resident
        self.uses = 0
        self.num_children_seen = 0
        self.gap = 0
        self.release: _Release | None = None  # the observation it is part of
        self.queue = -1  # of a candidate that may leave
        self.queued = 0  # time its place in the queue counts from


class Hazard(TreePolicy[_Block]):
    """Memory: what is known of up to nine capacities of blocks. O(number of classes) an eviction."""

    def __init__(self, capacity: int = 0) -> None:
        super().__init__()
        self._capacity = capacity
        self._known: dict[Hashable, _Block] = {}
        self._ghosts: OrderedDict[Hashable, _Block] = OrderedDict()  # evicted first in front
        self._clock = self._now = 0
        self._gap = 0  # of the request admitted last
        self._survival = Survival()
        self._open: dict[int, _Release] = {}  # the release of this moment, by class
        self._fresh: list[_Release] = []
        self._waiting: list[deque[_Release]] = [deque() for _ in range(NUM_AGES)]  # by the age reached
        self._num_released = self._num_releases = 0
        self._queues: list[OrderedDict[BlockId, _Block]] = [OrderedDict() for _ in range(NUM_CLASSES)]
        self._scores = [_NONE] * NUM_CLASSES  # of the queues' fronts, where not stale
        self._stale: set[int] = set()
        self._scored_at = -1
        self._lowest: int | None = None

    def begin(self, contents: Sequence[Hashable], num_hit: int) -> None:
        self._now = self._clock
        self._clock += len(contents)
        self._age_releases()
        blocks_per_release = self._num_released / self._num_releases if self._num_releases else 1.0
        if self._survival.advance(self._clock, blocks_per_release):
            self._scored_at = -1
        self._open.clear()
        deepest: _Block | None = None
        for content in contents:
            block = self._known.get(content)
            if block is None:
                break
            deepest = block
        self._gap = self._gap_step(deepest)

    def insert(
        self, block_id: BlockId, *, depth: int, content: Hashable = None, parent: BlockId | None = None
    ) -> None:
        if block_id in self._resident:
            raise KeyError(block_id)
        above = None if parent is None else self._resident.get(parent)
        name = object() if content is None else content
        block = self._known.get(name)
        if block is None:
            block = self._known[name] = _Block(name)
            if above is not None and above.num_children_seen < _MOST:
                above.num_children_seen += 1
        else:
            del self._ghosts[name]
        block.block_id = block_id
        self._resident[block_id] = block
        self._use(block, self._gap if above is None else above.gap)
        if block.enter(above) and above is not None:
            self._queue_passed(above)

    def pin(self, block_id: BlockId) -> None:
        block = self._candidate(block_id)
        self._num_candidates -= 1
        self._leave_queue(block)
        self._use(block, self._gap)
        if block.pin() and isinstance(block.parent, _Block):
            self._queue_passed(block.parent)

    def unpin(self, block_id: BlockId) -> None:
        block = self._pinned(block_id)
        block.unpin()
        self._num_candidates += 1
        block_class = _class_of(block)
        release = self._open.get(block_class)
        if release is None:
            release = self._open[block_class] = _Release(self._now, block_class)
            self._fresh.append(release)
            self._num_releases += 1
        release.num_unused += 1
        self._num_released += 1
        block.release = release
        self._enqueue(block, block_class, self._now)

    def victim(self) -> BlockId | None:
        while True:
            queue = self._lowest_queue()
            if queue is None:
                return None
            block = next(iter(self._queues[queue].values()))
            if block.may_leave:
                return block.block_id
            self._leave_queue(block)  # until its last child leaves

    def remove(self, block_id: BlockId) -> None:
        block = self._candidate(block_id)
        self._num_candidates -= 1
        del self._resident[block_id]
        queue = block.queue
        self._leave_queue(block)
        self._ghosts[block.content] = block
        if len(self._ghosts) > _GHOSTS * self._capacity:
            self._forget()
        parent = block.parent
        if block.leave() and isinstance(parent, _Block) and self._is_blocked(parent):
            # It was due before its last child: it follows at once.
            self._enqueue(parent, queue if queue >= 0 else _class_of(block), block.queued)
            self._queues[parent.queue].move_to_end(parent.block_id, last=False)
            self._stale.add(parent.queue)

    def _is_blocked(self, block: _Block) -> bool:
        return block.queue < 0 and not block.is_pinned and self._resident.get(block.block_id) is block

    def _use(self, block: _Block, gap: int) -> None:
        if block.release is not None:
            self._survival.add_used(block.release.block_class, self._now - block.release.time)
            block.release.num_unused -= 1
            block.release = None
        block.uses = min(_MOST, block.uses + 1)
        block.gap = gap

    def _gap_step(self, deepest: _Block | None) -> int:
        if deepest is None:
            return 0
        gap = 0 if deepest.release is None else self._now - deepest.release.time
        step = 1
        while step < CLASS_LEVELS[2] - 1 and 4 * gap >= self._capacity << (step - 1):
            step += 1
        return step

    def _forget(self) -> None:
        content, block = self._ghosts.popitem(last=False)
        del self._known[content]
        if block.release is not None:
            block.release.num_unused -= 1

    def _enqueue(self, block: _Block, queue: int, queued: int) -> None:
        """Last in the queue; whoever moves it to the front makes the queue's score stale."""
        block.queue, block.queued = queue, queued
        if not self._queues[queue]:
            self._stale.add(queue)
        self._queues[queue][block.block_id] = block

    def _queue_passed(self, block: _Block) -> None:
        """Its window passed while it waited for its children to leave."""
        if self._is_blocked(block):
            self._enqueue(block, _class_of(block), block.queued)

    def _leave_queue(self, block: _Block) -> None:
        if block.queue >= 0:
            queue = self._queues[block.queue]
            del queue[block.block_id]
            front = next(iter(queue.values()), None)
            if front is None or front.queued != block.queued:
                self._stale.add(block.queue)
            block.queue = -1

    def _lowest_queue(self) -> int | None:
        """Lowest score; then queued first; then the lower class."""
        if self._scored_at != self._now:
            self._scored_at = self._now
            self._stale.update(range(NUM_CLASSES))
        elif not self._stale:
            return self._lowest
        for queue in self._stale:
            front = next(iter(self._queues[queue].values()), None)
            age = 0 if front is None else self._now - front.queued
            self._scores[queue] = _NONE if front is None else self._survival.score(queue, age)
        self._stale.clear()
        self._lowest = self._lowest_of_scores()
        return self._lowest

    def _lowest_of_scores(self) -> int | None:
        lowest = min(self._scores)
        if lowest == _NONE:
            return None
        if self._scores.count(lowest) == 1:
            return self._scores.index(lowest)
        equal = [queue for queue, score in enumerate(self._scores) if score == lowest]
        return min(equal, key=lambda queue: next(iter(self._queues[queue].values())).queued)

    def _age_releases(self) -> None:
        """Releases that reach the next age: their unused blocks are at risk there; without any they go."""
        for release in self._fresh:
            self._enter(release, 0)
        self._fresh.clear()
        for bucket in range(1, NUM_AGES):
            younger, edge = self._waiting[bucket - 1], Survival.edges[bucket]
            while younger and self._now - younger[0].time >= edge:
                self._enter(younger.popleft(), bucket)

    def _enter(self, release: _Release, bucket: int) -> None:
        if release.num_unused:
            self._survival.add_at_risk(release.block_class, bucket, release.num_unused)
            self._waiting[bucket].append(release)


def _class_of(block: _Block) -> int:
    children = min(block.num_children_seen, 2)
    uses = _USES[block.uses] if block.uses < len(_USES) else 4
    return (children * CLASS_LEVELS[1] + uses) * CLASS_LEVELS[2] + block.gap
