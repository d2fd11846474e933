"""The replay core as a native library, through ctypes: arrays by address, no torch, no Python ABI.

The C++ sources are in csrc/. A call releases the interpreter lock; runs come in steps, so that progress can
be shown and Ctrl-C works between them.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_char_p, c_double, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from kvtune.cache.replay_records import Int32Array, IntArray, Outcome, ReplayJob, TraceArrays
from kvtune.errors import HostError, InvariantError, UsageError
from kvtune.native_library import find_library, open_library

__all__ = ["NativeCore", "NativeCurve", "NativeReplay", "NativeTrace", "library_path"]

ABI_VERSION: Final = 1
_MESSAGE_BYTES: Final = 512
_BAD_TRACE, _BAD_ARGUMENT, _POLICY_BUG, _NO_MEMORY = 1, 2, 3, 4
_FAULTS: Final = {
    1: "its offsets do not rise from 0 to the number of block ids",
    2: "it names a block outside 0..num_unique-1",
    3: "a block has two depths or two parents there; ids must name whole prefixes",
    4: "it has more requests or blocks than 32 bits hold",
}


class _Trace(ctypes.Structure):
    _fields_ = (
        ("block_ids", c_void_p),
        ("request_start", c_void_p),
        ("block_tokens", c_void_p),
        ("num_requests", c_int64),
        ("num_references", c_int64),
        ("num_unique", c_int64),
    )


class _Options(ctypes.Structure):
    _fields_ = (
        ("policy", c_char_p),
        ("capacity", c_int64),
        ("num_blocks", c_void_p),
        ("num_slots", c_void_p),
        ("max_hit", c_void_p),
        ("hit_blocks", c_void_p),
        ("hit_tokens", c_void_p),
        ("num_evicted", c_void_p),
        ("is_rejected", c_void_p),
        ("parameter_names", POINTER(c_char_p)),
        ("parameter_values", POINTER(c_double)),
        ("num_parameters", c_int32),
        ("keep_log", c_int32),
    )


def library_path() -> Path | None:
    """Where the built library lies: beside this module, or wherever the package was installed from."""
    return find_library("cache", "kvtune_replay")


class NativeCore:
    """A loaded library. HostError if it does not load or speaks another ABI."""

    def __init__(self, path: Path) -> None:
        library = open_library(
            path, "the replay core", abi_symbol="kvtune_replay_abi_version", abi_version=ABI_VERSION,
            is_one=True,
        )  # fmt: skip
        library.kvtune_replay_policy_name.restype = c_char_p
        for name in ("kvtune_replay_bytes", "kvtune_replay_log", "kvtune_lru_curve_bytes"):
            getattr(library, name).restype = c_int64
        self._library = library
        self.policies = tuple(
            bytes(library.kvtune_replay_policy_name(c_int32(i))).decode()
            for i in range(int(library.kvtune_replay_num_policies()))
        )

    def call(self, function: str, *args: object) -> None:
        """Call `function(*args, text, text_size)`; a status other than 0 becomes an exception."""
        text = ctypes.create_string_buffer(_MESSAGE_BYTES)
        status = int(getattr(self._library, function)(*args, text, c_int64(_MESSAGE_BYTES)))
        message = text.value.decode(errors="replace")
        if status == _BAD_ARGUMENT:
            raise UsageError(message)
        if status == _NO_MEMORY:
            raise HostError("the replay core ran out of memory; use a larger block size or a shorter trace")
        if status == _POLICY_BUG:
            raise InvariantError(f"{function}: {message}")
        if status == _BAD_TRACE:
            raise _BadTraceError

    def count(self, function: str, *args: object) -> int:
        return int(getattr(self._library, function)(*args))

    def free(self, function: str, handle: c_void_p) -> None:
        if handle.value is not None:
            getattr(self._library, function)(handle)
            handle.value = None


class _BadTraceError(Exception):
    """The library's word for a refused trace; NativeTrace says what is wrong."""


class NativeTrace:
    """A checked trace, shared by its replays. UsageError names the request where ids make no prefix tree."""

    def __init__(self, core: NativeCore, arrays: TraceArrays) -> None:
        self.core, self.arrays = core, arrays
        self.handle = c_void_p()
        record = _Trace(
            arrays.block_ids.ctypes.data,
            arrays.request_start.ctypes.data,
            arrays.block_tokens.ctypes.data,
            arrays.num_requests,
            arrays.num_references,
            arrays.num_unique,
        )
        fault, where = c_int32(), c_int64()
        try:
            core.call("kvtune_trace_new", byref(record), byref(self.handle), byref(fault), byref(where))
        except _BadTraceError:
            raise UsageError(f"block trace, request {where.value}: {_FAULTS[fault.value]}") from None

    def __del__(self) -> None:
        self.core.free("kvtune_trace_free", self.handle)


class NativeReplay:
    """One replay of a job; `run` may be called in steps."""

    name: Final = "native"

    def __init__(self, trace: NativeTrace, job: ReplayJob, outcome: Outcome) -> None:
        self.handle = c_void_p()
        self._trace, self._outcome, self._job = trace, outcome, job  # keep the arrays alive
        names = (c_char_p * len(job.parameters))(*(name.encode() for name in job.parameters))
        values = (c_double * len(job.parameters))(*job.parameters.values())
        limits = job.limits
        options = _Options(
            job.policy.encode(),
            job.capacity,
            None if limits is None else limits.num_blocks.ctypes.data,
            None if limits is None else limits.num_slots.ctypes.data,
            None if limits is None else limits.max_hit.ctypes.data,
            outcome.hit_blocks.ctypes.data,
            outcome.hit_tokens.ctypes.data,
            outcome.num_evicted.ctypes.data,
            outcome.is_rejected.ctypes.data,
            names,
            values,
            len(job.parameters),
            int(job.keep_log),
        )
        trace.core.call("kvtune_replay_new", trace.handle, byref(options), byref(self.handle))

    def run(self, until: int) -> None:
        """Serve requests up to, not including, `until`."""
        self._trace.core.call("kvtune_replay_run", self.handle, c_int64(until))

    def log(self) -> Int32Array:
        """The blocks that left, in order; empty unless the job keeps a log."""
        core = self._trace.core
        log = np.empty(core.count("kvtune_replay_log", self.handle, None), dtype=np.int32)
        core.count("kvtune_replay_log", self.handle, c_void_p(log.ctypes.data))
        return log

    def num_bytes(self) -> int:
        """Memory of the core: the trace's tree, the cache and the policy."""
        return self._trace.core.count("kvtune_replay_bytes", self.handle)

    def __del__(self) -> None:
        self._trace.core.free("kvtune_replay_free", self.handle)


class NativeCurve:
    """The LRU hits of every capacity in one pass; `run` may be called in steps.

    `hit_blocks` and `hit_tokens` int64 [num_unique + 1]: what hits from each capacity on.
    """

    def __init__(self, trace: NativeTrace, *, first_counted: int = 0) -> None:
        self.handle = c_void_p()
        self._trace, self._first_counted = trace, first_counted
        self.hit_blocks: IntArray = np.zeros(trace.arrays.num_unique + 1, dtype=np.int64)
        self.hit_tokens: IntArray = np.zeros(trace.arrays.num_unique + 1, dtype=np.int64)
        trace.core.call(
            "kvtune_lru_curve_new",
            trace.handle,
            _address(self.hit_blocks),
            _address(self.hit_tokens),
            byref(self.handle),
        )

    def run(self, until: int) -> None:
        core = self._trace.core
        core.call("kvtune_lru_curve_run", self.handle, c_int64(until), c_int64(self._first_counted))

    def num_bytes(self) -> int:
        own = self.hit_blocks.nbytes + self.hit_tokens.nbytes
        return own + self._trace.core.count("kvtune_lru_curve_bytes", self.handle)

    def __del__(self) -> None:
        self._trace.core.free("kvtune_lru_curve_free", self.handle)


def _address(array: npt.NDArray[np.int64]) -> c_void_p:
    return c_void_p(array.ctypes.data)
