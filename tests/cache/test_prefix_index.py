"""The hash index against the public suite."""

from kvtune.cache.prefix_index import HashIndex
from kvtune.testing.prefix_index import PrefixIndexSuite


class TestHashIndexConforms(PrefixIndexSuite):
    def make_index(self, *, max_evicted):
        return HashIndex(max_evicted=max_evicted)
