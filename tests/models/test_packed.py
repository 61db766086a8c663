"""Documents of one row do not see each other: their logits and gradients are those of each document alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from distill.core.errors import InputError
from distill.models.packed import check_apart

SIZES = (6, 1, 9, 4)
SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SPECIAL = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
APART: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 4},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0},
    "gpt_neox": {},
}
MIXES: dict[str, dict[str, Any]] = {
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "pad_token_id": 1},  # counts positions by the attention mask
    "bloom": {"n_layer": 2, "n_head": 4},  # knows no position ids
    "mamba": {"state_size": 4},  # has a state that runs on
}


def make(kind: str, attention: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    keys = {"vocab_size": 40, "initializer_range": 0.3, **SPECIAL, **SIZE, **(APART | MIXES)[kind]}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **keys)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)


def gradients(model: PreTrainedModel, rows: list[tuple[Tensor, Tensor]], weights: list[Tensor]) -> list[Tensor]:
    model.zero_grad()
    for (ids, places), weight in zip(rows, weights, strict=True):
        (model(input_ids=ids, position_ids=places, use_cache=False).logits * weight).sum().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", APART)
def test_a_packed_row_is_its_documents_alone(kind: str, attention: str, checkpointing: bool) -> None:
    model = make(kind, attention).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = torch.randint(0, 40, (2, sum(SIZES)), generator=torch.Generator().manual_seed(1))
    places = torch.cat([torch.arange(size) for size in SIZES]).expand(2, -1)
    alone = list(zip(ids.split(SIZES, 1), places.split(SIZES, 1), strict=True))
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=places, use_cache=False).logits
        apart = torch.cat([model(input_ids=some, use_cache=False).logits for some, _ in alone], 1)
        across = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(packed, apart, rtol=1e-5, atol=1e-5)  # rotary tables are fp32
    assert (packed - across).abs().max() > 0.1  # the documents would have seen each other
    weight = torch.randn(packed.shape, dtype=packed.dtype, generator=torch.Generator().manual_seed(2))
    ours = [g.clone() for g in gradients(model, [(ids, places)], [weight])]
    theirs = gradients(model, alone, list(weight.split(SIZES, 1)))
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", APART)
def test_what_keeps_documents_apart_is_taken(kind: str, attention: str, dtype: torch.dtype) -> None:
    model = make(kind, attention, dtype).train()
    check_apart(model)
    assert model.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MIXES)
def test_what_lets_them_see_each_other_is_refused_by_name(kind: str, dtype: torch.dtype) -> None:
    model = make(kind, "eager", dtype)
    with pytest.raises(InputError, match=rf"{type(model).__name__} does not separate the documents in one row"):
        check_apart(model)


def test_a_model_without_position_ids_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama", "sdpa", torch.float32)
    body = model.base_model.forward
    monkeypatch.setattr(model.base_model, "forward", lambda input_ids, use_cache: body(input_ids=input_ids))
    with pytest.raises(InputError, match="it takes no position_ids"):
        check_apart(model)
