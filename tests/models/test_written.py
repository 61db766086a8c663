"""A model folder is compared with the model in memory, whatever names and cuts its files have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from distill.core.errors import DistillError
from distill.models.load import load_model, new_model
from distill.models.written import check_written

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}


def make(kind: str, **more: object) -> torch.nn.Module:
    known = AutoConfig.for_model(kind).to_dict()
    keys = {key: value for key, value in SIZES.items() if key in known} | more
    return new_model(AutoConfig.for_model(kind, **keys), seed=0).to(torch.bfloat16)


@pytest.mark.parametrize(
    "kind", ["llama", "gpt2", "gpt_neox", "phi3", "gemma3_text", "mixtral", "qwen3_moe", "bloom", "granitemoe", "mamba"]
)
def test_what_is_written_is_what_is_read(kind: str, tmp_path: Path) -> None:
    """Also after it was loaded from files, whose names transformers gives back."""
    model = make(kind)
    model.save_pretrained(tmp_path / "one", max_shard_size=20_000)
    check_written(tmp_path / "one", model)
    again = load_model(str(tmp_path / "one"))
    again.save_pretrained(tmp_path / "two")
    check_written(tmp_path / "two", again)
    with torch.no_grad():
        last = [p for p in again.parameters() if p.ndim > 1][-1]
        last.view(-1)[-1] += 1
    with pytest.raises(
        DistillError,
        match=r"the saved model differs from the model in memory: .* is stored with other values; check the disk",
    ):
        check_written(tmp_path / "two", again)


def test_a_tied_head_and_a_weight_that_is_no_number(tmp_path: Path) -> None:
    model = make("llama", tie_word_embeddings=True)
    with torch.no_grad():
        model.get_input_embeddings().weight[3, 3] = float("nan")
    model.save_pretrained(tmp_path)
    check_written(tmp_path, model)


@pytest.mark.parametrize(
    ("spoil", "wrong"),
    [
        (lambda weight: weight.float(), r"is torch.float32, expected torch.bfloat16"),
        (lambda weight: weight[:-1].clone(), r"the weights do not fit the config|is \[63, 32\], expected \[64, 32\]"),
        (lambda weight: None, "is missing"),
    ],
)
def test_another_type_another_shape_and_none(spoil: object, wrong: str, tmp_path: Path) -> None:
    model = make("llama")
    model.save_pretrained(tmp_path)
    file, name = tmp_path / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    weights = load_file(file)
    weights[name] = spoil(weights[name])  # type: ignore[operator]
    save_file({key: value for key, value in weights.items() if value is not None}, file, metadata={"format": "pt"})
    with pytest.raises(
        DistillError, match=rf"the saved model differs from the model in memory: .*{name} ({wrong})|{wrong}"
    ):
        check_written(tmp_path, model)
