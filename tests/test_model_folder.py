"""A model folder is named by what lies in it: its repository, the precision of its weights."""

from __future__ import annotations

import json
from pathlib import Path

from kvtune.model_folder import hub_repo, weight_dtypes


def write_weights(folder: Path, *dtypes: str) -> None:
    header = {f"w{i}": {"dtype": d, "shape": [1], "data_offsets": [0, 2]} for i, d in enumerate(dtypes)}
    text = json.dumps({**header, "__metadata__": {"format": "pt"}}).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))


def test_a_folder_of_the_hub_cache_knows_its_repository(tmp_path: Path) -> None:
    place = tmp_path / "hub" / "models--some-org--some-model" / "snapshots" / ("a" * 40)
    place.mkdir(parents=True)
    assert hub_repo(place) == "some-org/some-model"
    assert hub_repo(tmp_path) is None


def test_the_weights_say_in_which_precisions_they_are_stored(tmp_path: Path) -> None:
    write_weights(tmp_path, "BF16", "F32", "BF16")
    assert weight_dtypes(tmp_path) == ["BF16", "F32"]


def test_damaged_weights_name_nothing_and_raise_nothing(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 12)
    assert weight_dtypes(tmp_path) == []
