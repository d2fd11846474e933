"""The native library of block pools, through ctypes: addresses and numbers, no Python ABI.

The C++ sources are in csrc/pool/.
"""

from __future__ import annotations

import ctypes
from array import array
from ctypes import POINTER, c_char_p, c_int32, c_int64, c_uint32, c_void_p
from pathlib import Path
from typing import Any, Final

from kvtune.cache.block_hashes import HASH_BYTES, BlockHashes
from kvtune.errors import InvariantError
from kvtune.native_library import find_library, open_library
from kvtune.types import BlockHash, TokenArray

__all__ = ["CacheLibrary", "PoolCounts", "cache_library", "library_path", "padded"]

ABI_VERSION: Final = 3
_NO_MEMORY: Final = 2
_P, _N, _I = c_void_p, c_int64, c_int32


class PoolCounts(ctypes.Structure):
    """Of one part of a pool; from `evicted` on of the whole pool, since construction. `bytes`: its memory,
    taken from the system as it is written."""

    _fields_ = (
        ("free", c_int64),
        ("idle", c_int64),
        ("evicted", c_int64),
        ("published", c_int64),
        ("duplicates", c_int64),
        ("bytes", c_int64),
    )


_SIGNATURES: Final[dict[str, tuple[tuple[Any, ...], Any]]] = {
    "kvtune_cache_message": ((), c_char_p),
    "kvtune_cache_num_policies": ((), _I),
    "kvtune_cache_policy_name": ((_I,), c_char_p),
    "kvtune_has_sha_instructions": ((), _I),
    "kvtune_hash_blocks": ((_P, _P, _N, _N, _I, _P), None),
    "kvtune_hash_each": ((_P, _P, _N, _N, _P), None),
    "kvtune_pool_new": ((_N, _N, _N, _N, _I, POINTER(_P)), _I),
    "kvtune_pool_free": ((_P,), None),
    "kvtune_pool_counts": ((_P, _I, POINTER(PoolCounts)), None),
    "kvtune_pool_find_run": ((_P, _P, _N, _N, _P), _N),
    "kvtune_pool_last_gap": ((_P, _P, _N, _N), _N),
    "kvtune_pool_mark_seen": ((_P, _P, _N, _N, _P), None),
    "kvtune_pool_match": ((_P, _P, _P, _N, _N, _N, _P, _P), None),
    "kvtune_pool_holds": ((_P, _P, _P, _N, _N, _P), _I),
    "kvtune_pool_num_idle": ((_P, _P, _N, _P), None),
    "kvtune_pool_num_released": ((_P, _P, _N, _P), None),
    "kvtune_pool_admit": ((_P, _P, _N, _P, _N, _N), _I),
    "kvtune_pool_take": ((_P, _I, _N, _P), _I),
    "kvtune_pool_incref": ((_P, _P, _N), _I),
    "kvtune_pool_decref": ((_P, _P, _N), _I),
    "kvtune_pool_publish": ((_P, _P, _P, _N, _N, _N), _I),
    "kvtune_pool_publish_each": ((_P, _P, _P, _P, _N, _N), _I),
    "kvtune_pool_forget": ((_P, _P, _N, _N), _I),
    "kvtune_pool_evict_idle": ((_P, POINTER(_I)), _I),
    "kvtune_pool_unpublish_all": ((_P,), _I),
    "kvtune_pool_set_budget": ((_P, _N), _I),
    "kvtune_pool_state": ((_P, _I), c_uint32),
    "kvtune_pool_digest": ((_P, _I, _P), None),
    "kvtune_pool_free_ids": ((_P, _P), _N),
    "kvtune_pool_victim": ((_P, _I), _I),
    "kvtune_index_find": ((_P, _P), _I),
    "kvtune_index_insert": ((_P, _P, _I), _I),
    "kvtune_index_evict": ((_P, _P), _I),
    "kvtune_index_forget": ((_P, _P), _I),
    "kvtune_index_was_evicted": ((_P, _P), _I),
    "kvtune_index_clear": ((_P,), None),
    "kvtune_index_size": ((_P,), _N),
    "kvtune_index_ids": ((_P, _P), _N),
    "kvtune_in_flight_new": ((POINTER(_P),), _I),
    "kvtune_in_flight_free": ((_P,), None),
    "kvtune_in_flight_lead": ((_P, _N, _P, _N, _N), _I),
    "kvtune_in_flight_leave": ((_P, _N, _P, _N, _N), None),
    "kvtune_in_flight_leader": ((_P, _P, _N), _N),
    "kvtune_in_flight_run": ((_P, _P, _N, _N), _N),
    "kvtune_in_flight_clear": ((_P,), None),
    "kvtune_in_flight_leaders": ((_P, _P), _N),
}


def library_path() -> Path | None:
    """Where the built library lies: beside this module, or wherever the package was installed from."""
    return find_library("cache", "kvtune_cache")


class CacheLibrary:
    """A loaded library. HostError if it does not load or speaks another ABI."""

    def __init__(self, path: Path) -> None:
        library = open_library(
            path, "the block pools", abi_symbol="kvtune_cache_abi_version", abi_version=ABI_VERSION,
            loader=ctypes.PyDLL,  # calls are short: they keep the interpreter lock
        )  # fmt: skip
        for name, (arguments, result) in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, result
            setattr(self, name.removeprefix("kvtune_"), function)
        self.policies = tuple(
            bytes(self.cache_policy_name(i)).decode() for i in range(self.cache_num_policies())
        )

    def __getattr__(self, name: str) -> Any:
        """The functions of the library, without their common prefix; set in the constructor."""
        raise AttributeError(name)

    def expect(self, status: int) -> None:
        """A status other than 0 becomes an exception: MemoryError, as from pools in Python, or ours."""
        if not status:
            return
        message = bytes(self.cache_message()).decode(errors="replace")
        if status == _NO_MEMORY:
            raise MemoryError("no memory is left for the bookkeeping of blocks; use fewer or larger blocks")
        raise InvariantError(message)

    def hash_chain(
        self, parent: bytes, tokens: TokenArray, block_size: int, *, portable: bool = False
    ) -> BlockHashes:
        """SHA-256 chain behind a parent of 32 bytes over contiguous token ids; see `hashing`."""
        num = len(tokens) // block_size
        out = array("B", b"\0") * (num * HASH_BYTES)
        address = tokens.__array_interface__["data"][0]
        self.hash_blocks(parent, address, 4 * block_size, num, portable, out.buffer_info()[0])
        return BlockHashes(out)

    def hash_block_each(self, parents: bytes, blocks: TokenArray) -> list[BlockHash]:
        """One block behind each of `parents`, 32 bytes a name: `blocks` contiguous int32 [n, block_size]."""
        num, size = blocks.shape
        out = ctypes.create_string_buffer(num * HASH_BYTES)
        self.hash_each(parents, blocks.__array_interface__["data"][0], 4 * size, num, out)
        names = out.raw
        return [BlockHash(names[at : at + HASH_BYTES]) for at in range(0, len(names), HASH_BYTES)]


def cache_library() -> CacheLibrary | None:
    """The library, None where it was not built. HostError if it is there and does not load."""
    path = library_path()
    return None if path is None else CacheLibrary(path)


def padded(block_hash: BlockHash) -> bytes:
    """A name as native code keeps it."""
    return block_hash.ljust(HASH_BYTES, b"\0")
