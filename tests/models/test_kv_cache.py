"""A model that rounds its keys and values, in every architecture that asks transformers' interface."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from distill.core.errors import InputError
from distill.models.kv_cache import cache_type, round_cache
from distill.models.load import load_model, new_config, new_model
from distill.models.packed import check_apart
from distill.quantization.fake_quant import switch, unquantized

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.2,
}
GROUPED = SIZES | {"intermediate_size": 96, "num_key_value_heads": 1, "bos_token_id": None, "eos_token_id": None}
KEYS: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "qwen3": GROUPED | {"head_dim": 64},
    "gemma3_text": GROUPED | {"head_dim": 32, "sliding_window": 4},
    "gpt2": {"vocab_size": 64, "n_embd": 64, "n_layer": 2, "n_head": 2, "initializer_range": 0.2},
    "gpt_neox": SIZES | {"intermediate_size": 96},
}
IDS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))


def build(kind: str = "llama", **more: Any) -> PreTrainedModel:
    return new_model(new_config({"model_type": kind, **KEYS[kind], **more}), seed=0)


@pytest.mark.parametrize("kind", KEYS)
def test_it_attends_to_rounded_keys_and_values_and_back(kind: str) -> None:
    model = build(kind)
    plain = model(IDS).logits
    round_cache(model, "q8_0")
    near = model(IDS).logits
    round_cache(model, "q4_0")
    far = model(IDS).logits
    assert 0 < (near - plain).abs().mean() < 0.3 * (far - plain).abs().mean()
    with unquantized(model):
        assert torch.equal(model(IDS).logits, plain)
    assert torch.equal(model(IDS).logits, far)
    switch(model, enabled=False)
    assert torch.equal(model(IDS).logits, plain)


def test_what_is_cached_step_by_step_is_what_is_read_at_once() -> None:
    model = build()
    round_cache(model, "q4_0")
    asked = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    whole = model.generate(IDS, use_cache=False, **asked)
    assert torch.equal(model.generate(IDS, **asked), whole)
    switch(model, enabled=False)
    assert not torch.equal(model.generate(IDS, **asked), whole)


def test_the_folder_says_so_and_the_loader_does_so(tmp_path: Path) -> None:
    model = build()
    plain = copy.deepcopy(model)
    round_cache(model, "q8_0")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["kv_cache_type"] == "q8_0"
    assert "sdpa" not in json.dumps(config)
    loaded = load_model(str(tmp_path), dtype="float32")
    assert cache_type(loaded.config) == "q8_0"
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    elsewhere = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(elsewhere(IDS).logits, plain(IDS).logits)
    (tmp_path / "config.json").write_text(json.dumps(config | {"kv_cache_type": "int3"}))
    with pytest.raises(InputError, match="kv_cache: got 'int3'"):
        load_model(str(tmp_path))


def test_documents_of_a_row_stay_apart_and_gradients_pass() -> None:
    model = build()
    check_apart(model)
    round_cache(model, "q8_0")
    check_apart(model)
    model(IDS).logits.square().sum().backward()
    key = model.model.layers[0].self_attn.k_proj.weight.grad
    other = build()
    other(IDS).logits.square().sum().backward()
    expected = other.model.layers[0].self_attn.k_proj.weight.grad
    assert (key - expected).norm() < 0.2 * expected.norm()


def test_another_attention_is_refused_by_name() -> None:
    model = build()
    model.set_attn_implementation("eager")
    with pytest.raises(InputError, match=r"needs attention implementation sdpa \(got eager for llama"):
        round_cache(model, "q8_0")
    with pytest.raises(InputError, match=r"needs head_dim \(16\)"):
        round_cache(build(head_dim=16), "q8_0")
    assert build(head_dim=16).config._attn_implementation == "sdpa"
