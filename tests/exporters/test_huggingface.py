import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedModel

from distill.core.batch import causal_batch
from distill.core.errors import DistillError, InputError
from distill.exporters import HuggingFace
from distill.exporters.plain_transformers import verify
from distill.quantization.convert import round_unquantized

Batches = list[dict[str, torch.Tensor]]


@pytest.fixture
def exported(artifact: Path, tmp_path: Path) -> Path:
    HuggingFace().export(artifact, tmp_path / "export", title="small")
    return tmp_path / "export"


def tamper(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    change(tensors)
    file.unlink()
    save_file(tensors, file, metadata={"format": "pt"})


def test_export_verifies_exactly(trained: PreTrainedModel, exported: Path, batches: Batches) -> None:
    result = HuggingFace(max_kl=0.0).verify(trained.train(), exported, batches)
    assert trained.training
    assert (result.tokens, result.max_abs_logit, result.mean_abs_logit, result.worst_kl) == (16, 0.0, 0.0, 0.0)
    assert result.top1_agreement == 1.0
    assert result.weight_bytes == (exported / "model.safetensors").stat().st_size


def test_export_copies_the_model_and_leaves_the_lineage(artifact: Path, exported: Path) -> None:
    for name in (
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ):
        assert (exported / name).read_bytes() == (artifact / name).read_bytes()
    assert not (exported / "distill.json").exists()
    assert AutoTokenizer.from_pretrained(exported)("w3 w5")["input_ids"] == [3, 5]


def test_an_unquantized_artifact_exports_too(
    make: Callable[[str], PreTrainedModel], tmp_path: Path, batches: Batches
) -> None:
    model = make("llama")
    round_unquantized(model, torch.bfloat16)
    copy.deepcopy(model).bfloat16().save_pretrained(tmp_path / "artifact")
    HuggingFace().export(tmp_path / "artifact", tmp_path / "export", title="plain")
    assert verify(model, tmp_path / "export", batches).worst_kl == 0.0
    facts = HuggingFace().card(tmp_path / "export")
    assert not facts.quantized
    assert "compressed-tensors" not in facts.how_to_load


def test_one_changed_scale_is_found(trained: PreTrainedModel, exported: Path, batches: Batches) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.down_proj.weight_scale"][3, 1] *= 1.5

    tamper(exported, change)
    with pytest.raises(
        DistillError, match="the exported model differs from the trained model: the largest KL"
    ) as error:
        HuggingFace().verify(trained, exported, batches)
    assert "expected at most 1e-06" in str(error.value)
    result = HuggingFace(max_kl=10.0).verify(trained, exported, batches)
    assert result.worst_kl > result.kl > 1e-6
    assert result.max_abs_logit > result.mean_abs_logit > 0


def test_one_changed_code_is_found(trained: PreTrainedModel, exported: Path, batches: Batches) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.v_proj.weight_packed"][0, 0] ^= 0b1000

    tamper(exported, change)
    with pytest.raises(DistillError, match="differs from the trained model"):
        HuggingFace().verify(trained, exported, batches)


def test_a_model_that_computes_nan_is_refused(trained: PreTrainedModel, exported: Path, batches: Batches) -> None:
    tamper(exported, lambda tensors: tensors["model.norm.weight"].fill_(torch.nan))
    with pytest.raises(DistillError, match=r"differs from the trained model: .* is nan"):
        HuggingFace(max_kl=1e9).verify(trained, exported, batches)


def test_damaged_folders_are_refused(
    trained: PreTrainedModel, exported: Path, batches: Batches, tmp_path: Path
) -> None:
    missing, extra, cut = (shutil.copytree(exported, tmp_path / name) for name in ("missing", "extra", "cut"))
    tamper(missing, lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.weight_scale"))
    with pytest.raises(DistillError, match="missing keys"):
        verify(trained, missing, batches)
    tamper(extra, lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(96, 64)}))
    with pytest.raises(DistillError, match="unexpected keys"):
        verify(trained, extra, batches)
    (cut / "model.safetensors").write_bytes((exported / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(DistillError, match="does not load in transformers"):
        verify(trained, cut, batches)


def test_kl_is_that_of_the_masked_tokens(
    make: Callable[[str], PreTrainedModel], tmp_path: Path, batches: Batches
) -> None:
    model = make("llama")
    other = make("llama")
    with torch.no_grad():
        other.lm_head.weight.mul_(1.1)
    other.save_pretrained(tmp_path)
    ids, mask = batches[0]["input_ids"], torch.zeros_like(batches[0]["mask"])
    mask[0, 2] = mask[1, 5] = True
    p, q = (m(ids).logits[mask].double().softmax(-1) for m in (model, other))
    expected = (p * (p / q).log()).sum(-1)
    result = verify(model, tmp_path, [causal_batch(ids, mask)], max_kl=10.0)
    assert result.tokens == 2
    assert result.kl == pytest.approx(expected.mean().item(), rel=1e-6)
    assert result.worst_kl == pytest.approx(expected.max().item(), rel=1e-6)


def test_refusals(trained: PreTrainedModel, artifact: Path, exported: Path, batches: Batches, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not empty"):
        HuggingFace().export(artifact, exported, title="small")
    with pytest.raises(InputError, match="not a model folder"):
        HuggingFace().export(tmp_path / "nowhere", tmp_path / "new", title="small")
    with pytest.raises(InputError, match="select 0 tokens to compare"):
        verify(trained, exported, [causal_batch(batches[0]["input_ids"], torch.zeros(2, 9, dtype=torch.bool))])
    with pytest.raises(InputError, match="select 0 tokens to compare"):
        verify(trained, exported, [])


def test_a_cache_that_the_engine_lacks_is_said(artifact: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(artifact, tmp_path / "source"))
    config = json.loads((source / "config.json").read_text()) | {"kv_cache_type": "q8_0"}
    (source / "config.json").write_text(json.dumps(config))
    (note,) = HuggingFace().export(source, tmp_path / "out", title="small")
    assert note.startswith(
        "keys and values: trained for llama.cpp's KV cache in q8_0, which plain transformers does not have"
    )


def test_export_holds_no_path_of_the_machine(artifact: Path, exported: Path) -> None:
    for file in exported.glob("*.[jm]*"):
        assert str(artifact.parent) not in file.read_text(errors="ignore"), file.name
    assert "_name_or_path" not in json.loads((exported / "config.json").read_text())
