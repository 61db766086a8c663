"""What of a model folder is delivered: the model and its tokenizer, and nothing that a link leads to elsewhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from distill.core.errors import InputError
from distill.exporters import EXPORTERS, HuggingFace, Onnx
from distill.exporters.base import ExporterSpec
from distill.exporters.deliver import copy_files

SECRET = "a password"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    file = tmp_path / "elsewhere" / "secret"
    file.parent.mkdir()
    file.write_text(json.dumps({"a": SECRET}))
    return file


@pytest.mark.parametrize("target", [HuggingFace(), Onnx(weights="float32")], ids=lambda target: target.kind)
def test_only_the_model_and_its_tokenizer_are_delivered(
    target: ExporterSpec, artifact: Path, secret: Path, tmp_path: Path
) -> None:
    for name in ("notes.txt", "x.json", "y.jinja", "z.model"):
        shutil.copy(secret, artifact / f"copy-{name}")
        (artifact / name).symlink_to(secret)
    (artifact / ".hidden.json").write_text(SECRET)
    (artifact / "additional").mkdir()
    target.export(artifact, tmp_path / "out", title="small")
    made = {file.name: file for file in (tmp_path / "out").iterdir()}
    wanted = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert set(made) == wanted | ({"model.safetensors"} if target.kind == "huggingface" else {"model.onnx"})
    assert [name for name, file in made.items() if file.is_symlink() or SECRET.encode() in file.read_bytes()] == []


@pytest.mark.parametrize("target", [HuggingFace(), Onnx(weights="float32")], ids=lambda target: target.kind)
@pytest.mark.parametrize("name", ["vocab.txt", "generation_config.json"])
def test_a_link_out_of_the_folder_is_refused(
    name: str, target: ExporterSpec, artifact: Path, secret: Path, tmp_path: Path
) -> None:
    (artifact / name).unlink(missing_ok=True)
    (artifact / name).symlink_to(secret)
    with pytest.raises(InputError) as refused:
        target.export(artifact, tmp_path / "out", title="small")
    what = f"a link to {secret}, which is outside of the folder, so it is not exported; replace it by the file"
    assert str(refused.value) == f"{artifact / name}: {what}"
    assert not (tmp_path / "out" / name).exists()


def test_weights_behind_a_link_out_of_the_folder_are_refused(artifact: Path, tmp_path: Path) -> None:
    (artifact / "model.safetensors").rename(tmp_path / "weights")
    (artifact / "model.safetensors").symlink_to(tmp_path / "weights")
    with pytest.raises(InputError, match=r"model\.safetensors: a link to .*/weights, which is outside of the folder"):
        HuggingFace().export(artifact, tmp_path / "out", title="small")


def test_links_within_the_folder_and_within_the_hubs_cache_are_followed(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache shows a model as a folder of links to files that are called by their hash."""
    snapshot, blobs = (
        tmp_path / "hub" / "models--a--b" / "snapshots" / "0123",
        tmp_path / "hub" / "models--a--b" / "blobs",
    )
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(artifact.iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / str(number))
    (snapshot / "merges.txt").symlink_to("tokenizer_config.json")
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="outside of the folder"):
        copy_files(snapshot, tmp_path / "out")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    copy_files(snapshot, tmp_path / "out", weights=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (artifact / name).read_bytes()
    assert not any(file.is_symlink() for file in (tmp_path / "out").iterdir())


def test_every_exporter_that_copies_is_tested_here() -> None:
    assert set(EXPORTERS) == {"huggingface", "onnx", "gguf", "torchao"}  # the last two write every file themselves
