"""A head alone on disk gives the logits that it gave in its model, scales and soft-cap and tied weights included."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from distill.core.errors import InputError
from distill.models.head import hidden_states, load_head, output_head, save_head

SIZES = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
}


def model_of(model_type: str, **keys: object) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SIZES, **keys)).eval()


@pytest.mark.parametrize(
    ("model_type", "keys"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("gemma2", {"final_logit_softcapping": 0.5, "head_dim": 8}),
        ("cohere", {"logit_scale": 0.25}),
        ("granite", {"logits_scaling": 4.0}),
    ],
)
def test_same_logits(model_type: str, keys: dict[str, object], tmp_path: Path) -> None:
    model = model_of(model_type, **keys)
    save_head(model, tmp_path / "head.safetensors")
    with torch.no_grad():
        hidden = hidden_states(model, torch.arange(6).unsqueeze(0))[0]
        whole = output_head(model).logits(hidden)
        alone = load_head(tmp_path / "head.safetensors")
        assert torch.equal(alone.logits(hidden), whole)
    assert not any(parameter.requires_grad for parameter in alone.parameters)


def test_a_head_that_is_no_linear_layer_is_refused(tmp_path: Path) -> None:
    model = model_of("llama")
    model.set_output_embeddings(torch.nn.Sequential(model.get_output_embeddings()))
    with pytest.raises(InputError, match="not a linear layer"):
        save_head(model, tmp_path / "head.safetensors")
