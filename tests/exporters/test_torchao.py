from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from distill.core.errors import DistillError, InputError
from distill.exporters import Torchao
from distill.exporters.base import EngineMissing
from distill.exporters.compressed_tensors import save
from distill.quantization import Q40, Q80, QUANTIZERS
from distill.quantization.convert import round_unquantized
from distill.quantization.prepare import prepare

pytest.importorskip("torchao", reason="torchao is not installed: pip install 'distill-lm[torchao]'")

Batches = list[dict[str, torch.Tensor]]
GRIDS = {
    "int_group": {"bits": 4, "group_size": 32},
    "int8_channel": {},
    "q4_0": {},
    "ternary": {},
    "asymmetric": {"bits": 3, "group_size": 32, "symmetry": "asymmetric"},
}


@pytest.mark.parametrize("name", GRIDS)
def test_codes_are_written_as_they_were_trained(
    name: str, make: Callable[[str], PreTrainedModel], batches: Batches, tmp_path: Path
) -> None:
    model = make("qwen3")
    spec = QUANTIZERS["int_group" if name == "asymmetric" else name](**GRIDS[name])
    prepare(model, spec)
    round_unquantized(model, torch.float32)
    save(model, tmp_path / "artifact", dtype=torch.float32)
    _tokenizer(tmp_path / "artifact")
    notes = Torchao().export(tmp_path / "artifact", tmp_path / "out", title="small")
    assert notes[0].startswith("14 layers from their codes of ")
    result = Torchao(max_kl=0.0).verify(model, tmp_path / "out", batches)
    assert result.tokens == 16
    assert result.max_abs_logit == 0, "to the last bit"


def test_a_full_model_is_rounded_only_when_asked(
    make: Callable[[str], PreTrainedModel], batches: Batches, tmp_path: Path
) -> None:
    model = make("llama")
    model.save_pretrained(tmp_path / "artifact")
    _tokenizer(tmp_path / "artifact")
    with pytest.raises(InputError, match="not low-bit; set round_to: int8"):
        Torchao().export(tmp_path / "artifact", tmp_path / "a", title="small")
    notes = Torchao(round_to="int8").export(tmp_path / "artifact", tmp_path / "out", title="small")
    assert notes == ["linear layers: int8 per channel, rounded to nearest by the exporter, after training"]
    assert 0 < Torchao(max_kl=0.1).verify(model, tmp_path / "out", batches).kl < 1e-2
    with pytest.raises(DistillError, match="differs from the trained model: the largest KL"):
        Torchao().verify(model, tmp_path / "out", batches)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_embeddings_are_written_from_their_codes_once(
    name: str, make: Callable[[str], PreTrainedModel], batches: Batches, tmp_path: Path
) -> None:
    model = make(name)
    prepare(model, Q40(), embeddings=Q80())
    round_unquantized(model, torch.float32)
    save(model, tmp_path / "artifact", dtype=torch.float32)
    _tokenizer(tmp_path / "artifact")
    Torchao().export(tmp_path / "artifact", tmp_path / "out", title="small")
    assert Torchao(max_kl=0.0).verify(model, tmp_path / "out", batches).max_abs_logit == 0
    keys = load_file(tmp_path / "out" / "model.safetensors")
    assert "model.embed_tokens._weight_qdata" in keys
    assert ("lm_head._weight_qdata" in keys) == (name == "llama")
    with pytest.raises(InputError, match="the embeddings are low-bit already"):
        Torchao(embeddings="int8").export(tmp_path / "artifact", tmp_path / "again", title="small")
    with pytest.raises(InputError, match="the model's embeddings are Q8_0 already"):
        Torchao(embeddings="int8").check_grids([Q40()], None, Q80())


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_full_precision_embeddings_are_rounded_when_asked(
    name: str, make: Callable[[str], PreTrainedModel], batches: Batches, tmp_path: Path
) -> None:
    model = make(name)
    model.save_pretrained(tmp_path / "artifact")
    _tokenizer(tmp_path / "artifact")
    target = Torchao(round_to="int8", embeddings="int8", max_kl=0.1)
    notes = target.export(tmp_path / "artifact", tmp_path / "out", title="small")
    assert notes[1] == "embeddings and head: int8 per row, rounded to nearest by the exporter, after training"
    assert 0 < target.verify(model, tmp_path / "out", batches).kl < 2e-2


def test_what_cannot_be_done_is_named(
    artifact: Path, trained: PreTrainedModel, batches: Batches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="low-bit already; remove round_to"):
        Torchao(round_to="int8").export(artifact, tmp_path / "a", title="small")
    monkeypatch.setattr("distill.exporters.base.find_spec", lambda module: None)
    with pytest.raises(InputError, match=r"target torchao needs torchao, which .* not installed: .*lm\[torchao\]"):
        Torchao().export(artifact, tmp_path / "b", title="small")
    with pytest.raises(
        EngineMissing, match="not verified in transformers with torchao, in fp32, which is not installed"
    ):
        Torchao().verify(trained, tmp_path, batches)


def _tokenizer(folder: Path) -> None:
    from distill.data.tokenizer import train_tokenizer

    train_tokenizer(["what it knows"], 260, folder / "tokenizer").save_pretrained(folder)
