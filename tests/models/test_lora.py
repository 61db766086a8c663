from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import LlamaConfig, LlamaForCausalLM

from distill.core.errors import InputError
from distill.models.lora import LoraSpec, add_lora, merge_lora


@pytest.fixture
def model() -> LlamaForCausalLM:
    return make()


def make(**settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **settings)).eval()


def trained(adapted: Any) -> Any:
    torch.manual_seed(1)
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.2)
    return adapted.eval()


IDS = torch.arange(10).reshape(2, 5)


def test_fresh_adapters_change_nothing_and_alone_are_trained(model: LlamaForCausalLM) -> None:
    before = model(input_ids=IDS).logits
    adapted = add_lora(model, LoraSpec(r=4, alpha=6, dropout=0.25))
    assert torch.equal(adapted(input_ids=IDS).logits, before)
    names = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert len(names) == 2 * 7 * 2  # A and B of seven layers in two blocks; the head has none
    assert all("lora_" in name for name in names)
    layer = adapted.get_base_model().model.layers[0].mlp.up_proj
    assert layer.scaling["default"] == 1.5
    assert layer.lora_A["default"].weight.shape == (4, 32)
    assert layer.lora_dropout["default"].p == 0.25


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "lm_head")])
def test_merging_is_the_sum_and_keeps_the_function(model: LlamaForCausalLM, targets: Any) -> None:
    before = {name: w.clone() for name, w in model.state_dict().items()}
    adapted = trained(add_lora(model, LoraSpec(r=4, alpha=6, target_modules=targets)))
    expected = dict(before)
    for name, module in adapted.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            expected[f"{name}.weight"] = before[f"{name}.weight"].double() + 1.5 * b.double() @ a.double()
    logits = adapted(input_ids=IDS).logits
    merged = merge_lora(adapted)
    assert type(merged) is LlamaForCausalLM
    assert list(merged.state_dict()) == list(before)
    changed = 0
    for name, weight in merged.state_dict().items():
        torch.testing.assert_close(weight.double(), expected[name].double(), rtol=1e-6, atol=1e-6)
        changed += not torch.equal(weight, before[name])
    assert changed == (14 if targets == "all-linear" else 3)
    torch.testing.assert_close(merged(input_ids=IDS).logits, logits, rtol=1e-4, atol=1e-4)


def test_an_adapter_on_a_shared_weight_is_refused() -> None:
    """Merged into a tied head it would change the embeddings too."""
    with pytest.raises(InputError, match=r"embed_tokens and lm_head share a weight.*adapter on lm_head.*remove it"):
        add_lora(make(tie_word_embeddings=True), LoraSpec(target_modules=("q_proj", "lm_head")))
    model = make(tie_word_embeddings=True)
    merged = merge_lora(trained(add_lora(model, LoraSpec())))
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


def test_targets_that_fit_nothing_are_one_line(model: LlamaForCausalLM) -> None:
    with pytest.raises(InputError, match=r"^lora.target_modules: .*no_such_proj") as raised:
        add_lora(model, LoraSpec(target_modules=("no_such_proj",)))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("settings", [{"r": 0}, {"alpha": 0}, {"dropout": 1.0}, {"rank": 8}])
def test_settings_without_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        LoraSpec(**settings)
