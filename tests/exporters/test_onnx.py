from collections.abc import Callable
from pathlib import Path
from shutil import copyfile

import numpy
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

from distill.core.errors import DistillError, InputError
from distill.exporters import Onnx
from distill.exporters.base import EngineMissing

for module in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(module, reason=f"{module} is not installed: pip install 'distill[test]'")

Batches = list[dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {weights: tmp_path_factory.mktemp("onnx") / weights for weights in ("float32", "int8")}


@pytest.fixture
def write(artifact: Path, exported: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Both kinds of one export, traced once for all tests: that takes seconds."""

    def once(weights: str) -> Path:
        folder = exported[weights]
        if not folder.is_dir():
            if weights == "int8":
                graph = once("float32") / "model.onnx"
                monkeypatch.setattr("distill.exporters.onnx.write_graph", lambda model, file: copyfile(graph, file))
            notes = Onnx(weights=weights).export(artifact, folder, title="small")
            (folder / "notes.txt").write_text("\n".join(notes))
        return folder

    return once


def test_float32_is_the_trained_model(trained: PreTrainedModel, write: Callable[[str], Path], batches: Batches) -> None:
    folder = write("float32")
    result = Onnx(weights="float32", max_kl=1e-6).verify(trained, folder, batches)
    assert result.tokens == 16
    assert result.top1_agreement == 1.0
    assert result.weight_bytes == (folder / "model.onnx").stat().st_size
    assert (folder / "notes.txt").read_text().endswith("14 layers hold the values of their codes")


def test_int8_is_smaller_close_and_bounded(
    trained: PreTrainedModel, write: Callable[[str], Path], batches: Batches
) -> None:
    import onnx

    folder = write("int8")
    result = Onnx(max_kl=1.0).verify(trained, folder, batches)
    assert 0 < result.kl < 0.1
    kinds = [node.op_type for node in onnx.load(folder / "model.onnx").graph.node]
    assert kinds.count("MatMulInteger") == 14  # the tied head is left out
    assert result.weight_bytes < Onnx().verify(trained, write("float32"), batches).weight_bytes
    assert "14 layers were low-bit before, and are rounded a second time" in (folder / "notes.txt").read_text()
    with pytest.raises(DistillError, match="not the trained one: KL"):
        Onnx(max_kl=0.0).verify(trained, folder, batches)


def test_any_batch_and_length_and_padding(trained: PreTrainedModel, write: Callable[[str], Path]) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(write("float32") / "model.onnx")
    for rows, length in ((1, 1), (3, 17)):
        ids = torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(2))
        mask = torch.ones_like(ids)
        mask[0, (length + 1) // 2 :] = 0
        with torch.no_grad():
            expected = trained(input_ids=ids, attention_mask=mask).logits.numpy()
        (found,) = session.run(["logits"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        read = mask.bool().numpy()
        assert numpy.abs(found[read] - expected[read]).max() < 1e-4


def test_the_tokenizer_comes_along_and_the_lineage_stays(write: Callable[[str], Path]) -> None:
    folder = write("int8")
    assert AutoTokenizer.from_pretrained(folder)("w3 w5")["input_ids"] == [3, 5]
    assert not {"distill.json", "model.safetensors"} & {file.name for file in folder.iterdir()}
    assert "quantization_config" not in (folder / "config.json").read_text()


def test_a_damaged_graph_and_missing_packages_are_named(
    trained: PreTrainedModel, artifact: Path, batches: Batches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(DistillError, match="ONNX Runtime does not load it"):
        Onnx().verify(trained, tmp_path, batches)
    monkeypatch.setattr("distill.exporters.base.find_spec", lambda module: None)
    with pytest.raises(EngineMissing, match="not verified in ONNX Runtime"):
        Onnx().verify(trained, tmp_path, batches)
    with pytest.raises(InputError, match=r"target onnx needs onnx, which is not installed: .*distill\[onnx\]"):
        Onnx().export(artifact, tmp_path / "new", title="small")
