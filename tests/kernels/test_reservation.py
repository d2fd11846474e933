"""Memory comes when it is written and goes back row by row; what stays does not move."""

from pathlib import Path

import pytest
import torch

from kvtune.errors import UsageError
from kvtune.kernels import AssignedRows, LayerCache, LowPlanes, Reservation, copy_blocks
from kvtune.kernels.reservation import zeroed
from kvtune.spec import PackedLayout


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_a_reservation_costs_what_was_written_and_gives_it_back():
    rows, size = 64, 1 << 20
    before = resident_bytes()
    reservation = Reservation(rows, size)
    assert resident_bytes() - before < 4 << 20
    reservation.tensor[:32] = 7
    assert 31 << 20 < resident_bytes() - before < 40 << 20
    assert reservation.give_back(range(8, 32)) == 24 << 20
    assert resident_bytes() - before < 16 << 20
    assert (reservation.tensor[:8] == 7).all()
    assert not reservation.tensor[8:].any()


def test_only_whole_pages_within_the_rows_go():
    reservation = Reservation(10, 3000)
    reservation.tensor[:] = 5
    reservation.give_back([1, 2, 5])  # bytes 3000..8999 hold one whole page, 15000..17999 none
    kept = [row for row in range(10) if row not in (1, 2, 5)]
    assert (reservation.tensor[kept] == 5).all()
    assert not reservation.tensor.view(-1)[4096:8192].any()
    assert Reservation(0, 64).give_back([]) == 0


def huge_bytes_at(address: int) -> int | None:
    """Bytes of large pages in the mapping that holds `address`; None where the system does not tell."""
    smaps = Path("/proc/self/smaps")
    if not smaps.is_file():
        return None
    is_here = False
    for line in smaps.read_text().splitlines():
        bounds = line.split()[0].split("-")
        if len(bounds) == 2 and ":" not in bounds[0]:
            is_here = int(bounds[0], 16) <= address < int(bounds[1], 16)
        elif is_here and line.startswith("AnonHugePages:"):
            return int(line.split()[1]) << 10
    return None


def test_a_large_arena_lies_in_large_pages_that_are_taken_when_written():
    switch = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not switch.is_file() or "[never]" in switch.read_text():
        pytest.skip("this system has no transparent large pages")
    before = resident_bytes()
    arena = zeroed(1024, 64 << 10)
    assert resident_bytes() - before < 4 << 20
    arena[:512] = 3
    assert resident_bytes() - before < 40 << 20
    assert (huge_bytes_at(arena.data_ptr() + (16 << 20)) or 0) >= 24 << 20
    assert (arena[:512] == 3).all()
    assert not arena[512:].any()


@pytest.mark.parametrize("shape", [(4, 64), (1, 16 << 20), (300, 65_600)])
def test_arenas_of_any_size_are_zero_aligned_and_writable(shape: tuple[int, int]):
    arena = zeroed(*shape)
    assert arena.shape == shape
    assert arena.is_contiguous()
    assert arena.data_ptr() % 64 == 0
    assert not arena.any()
    arena.fill_(255)
    assert int(arena[-1, -1]) == 255


def test_assigned_rows_are_read_where_the_pool_says_and_given_out_by_nobody_else():
    layout = PackedLayout(
        block_size=16, num_kv_heads=2, k_head_dim=64, v_head_dim=64, k_codec="n8_rh", v_codec="n8_rh"
    )
    row_of = torch.tensor([1, -1, 0, -1], dtype=torch.int32)
    cache = LayerCache.allocate(layout, 4, rows={"v": AssignedRows(row_of, 2)})
    low = cache.low_planes["v"]
    assert (low.num_rows, low.num_blocks, cache.low_planes["k"].num_rows) == (2, 4, 4)
    low.write_rows(
        torch.tensor([0, 1]), torch.arange(2, dtype=torch.uint8)[:, None].expand(2, low.plane_bytes)
    )
    assert low.read([2, 0])[:, 0].tolist() == [0, 1]
    row_of[1] = 0  # the pool's own array: seen at once
    assert low.is_resident([0, 1, 2, 3]).tolist() == [True, True, True, False]
    for verb in (
        lambda: low.drop([0]),
        lambda: low.attach([3]),
        lambda: low.resize(4),
        lambda: copy_blocks(cache, [0], [2]),
    ):
        with pytest.raises(UsageError, match="block pool"):
            verb()
    copy_blocks(cache, [0], [2], rows=(torch.tensor([1]), torch.tensor([0])))
    assert low.read([2])[0, 0] == 1
    assert LowPlanes(2, 64).is_assigned is False
