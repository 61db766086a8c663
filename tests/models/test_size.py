"""Parameters as the architecture counts them, bytes as the disk holds them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from distill.core.errors import InputError
from distill.models.size import measure_size, weight_bytes


@pytest.mark.parametrize("tied", [False, True])
def test_against_the_tensors_in_the_file(tiny_folders: list[Path], tied: bool) -> None:
    folder = tiny_folders[tied]
    with safe_open(folder / "model.safetensors", "pt") as file:
        stored = {name: file.get_tensor(name).numel() for name in file.keys()}  # noqa: SIM118
    size = measure_size(folder)
    assert size.parameters == sum(stored.values())
    assert size.non_embedding_parameters == sum(
        n for name, n in stored.items() if "embed" not in name and "lm_head" not in name
    )
    assert size.weight_bytes == (folder / "model.safetensors").stat().st_size
    assert size.bits_per_parameter == pytest.approx(16, rel=0.1)


def test_packed_weights_count_as_what_they_stand_for(tiny_folders: list[Path], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folders[0], tmp_path / "packed")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"a": torch.zeros(250)}, folder / "model.safetensors")
    num_bytes = (folder / "model.safetensors").stat().st_size
    size, plain = measure_size(folder), measure_size(tiny_folders[0])
    assert (size.parameters, size.non_embedding_parameters) == (plain.parameters, plain.non_embedding_parameters)
    assert size.bits_per_parameter == pytest.approx(8 * num_bytes / plain.parameters)


def test_only_the_shards_of_the_index_count(tmp_path: Path) -> None:
    for name, size in (("a", 10), ("b", 20), ("left_over", 40)):
        (tmp_path / f"{name}.safetensors").write_bytes(b"x" * size)
    index = {"weight_map": {"one": "a.safetensors", "two": "b.safetensors", "three": "a.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert weight_bytes(tmp_path) == 30
    assert weight_bytes(tmp_path / "left_over.safetensors") == 40
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(InputError, match=r"b\.safetensors"):
        weight_bytes(tmp_path)


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no \*\.safetensors"):
        weight_bytes(tmp_path)
    with pytest.raises(InputError, match="not a model folder"):
        measure_size(tmp_path)
