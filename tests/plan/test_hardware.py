"""Cards by the names people use, and what is known of each."""

from __future__ import annotations

import re

import pytest

from kvtune.errors import UsageError
from kvtune.plan import GPUS, find_gpu

GIB = 1 << 30


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("H100", "H100-80GB"),
        ("h100 sxm", "H100-80GB"),
        ("H100 PCIe", "H100-PCIe"),
        ("a100 40gb", "A100-40GB"),
        ("L4", "L4"),
        ("l40s", "L40S"),
        ("4090", "RTX-4090"),
        ("GeForce RTX 4090 D", "GeForce RTX 4090 D"),
        ("mi300x", "MI300X"),
        ("A10G", "A10G"),
        ("GB10", "GB10"),
    ],
)
def test_a_card_is_found_whatever_its_case_and_separators(asked: str, found: str) -> None:
    assert find_gpu(asked).name == found


@pytest.mark.parametrize("asked", ["A100", "", "TPU-v9", "H", "x" * 5000, "; rm -rf /"])
def test_an_ambiguous_or_unknown_card_names_what_it_may_be_and_the_way_out(asked: str) -> None:
    with pytest.raises(UsageError, match="did you mean") as error:
        find_gpu(asked)
    assert "--gpu-memory" in str(error.value)
    assert len(str(error.value)) < 1500


def test_checked_cards_carry_memory_bandwidth_and_throughput() -> None:
    assert len(GPUS) >= 30
    for gpu in GPUS.values():
        assert 12 * GIB < gpu.memory_bytes < 320 * GIB
        assert gpu.bandwidth is not None
        assert 2e11 < gpu.bandwidth < 1e13
        assert gpu.flops is not None
        assert 5e13 < gpu.flops < 4e15
        assert gpu.memory_basis in ("driver", "nominal")


def test_a_driver_reports_no_more_than_the_data_sheet() -> None:
    for gpu in GPUS.values():
        stated = re.search(r"-(\d+)GB$", gpu.name)
        if stated is not None:
            assert 0.9 * int(stated[1]) * GIB < gpu.memory_bytes <= int(stated[1]) * GIB


def test_other_cards_say_that_their_memory_is_nominal_and_their_throughput_unknown() -> None:
    card = find_gpu("A10G")
    assert (card.memory_bytes, card.memory_basis, card.flops) == (24 * GIB, "nominal", None)
