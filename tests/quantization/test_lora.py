from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from distill.core.errors import InputError
from distill.quantization import Int8Channel, IntGroup
from distill.quantization.base import QuantizerSpec
from distill.quantization.convert import convert
from distill.quantization.lora import absorb_lora, merged_weight
from distill.quantization.prepare import prepare


def adapted(model: nn.Module, **settings: Any) -> Any:
    """peft adapters with a B that is not zero, as after training."""
    peft_model = get_peft_model(model, LoraConfig(r=4, lora_alpha=7, target_modules="all-linear", **settings))
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return peft_model.eval()


@pytest.mark.parametrize("spec", [IntGroup(), Int8Channel()], ids=lambda spec: spec.kind)
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}], ids=["plain", "rslora"])
def test_merging_changes_no_bit(
    llama: nn.Module, ids: torch.Tensor, spec: QuantizerSpec, settings: dict[str, bool]
) -> None:
    names = prepare(llama, spec)
    model = adapted(llama, **settings)
    beside = model(ids).logits
    assert absorb_lora(model) == [f"base_model.model.{name}" for name in names]
    trained = model(ids).logits
    assert not torch.equal(trained, beside)  # an adapter beside the grid is another model
    merged = model.merge_and_unload()
    assert torch.equal(merged(ids).logits, trained)
    codes = convert(merged)
    assert list(codes) == names
    with torch.no_grad():
        for name, layer_codes in codes.items():
            layer = merged.get_submodule(name)
            layer.enabled = False
            layer.weight.copy_(spec.dequantize(layer_codes))
    assert torch.equal(merged(ids).logits, trained)


def test_adapter_gradients_are_those_of_the_merged_weight() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 8))
    prepare(model, IntGroup(group_size=16))
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, target_modules=["0"]))
    absorb_lora(model)
    layer = model.base_model.model[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    nn.init.normal_(b)
    x, upstream = torch.randn(5, 32), torch.randn(5, 8)
    out = model(x)
    out.backward(upstream)
    gradient = upstream.T @ x  # of the effective weight
    torch.testing.assert_close(b.grad, 1.5 * gradient @ a.T)
    torch.testing.assert_close(a.grad, 1.5 * b.T @ gradient)
    assert layer.base_layer.weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_weight_is_pefts_also_under_autocast(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 8, dtype=dtype))
    prepare(model, Int8Channel())
    model = adapted(model)
    layer = model.base_model.model[0]
    absorb_lora(model)
    with torch.autocast("cpu", torch.bfloat16):
        expected = merged_weight(layer).detach().clone()
    layer.merge()
    assert layer.base_layer.weight.dtype == expected.dtype == dtype
    assert torch.equal(layer.base_layer.weight, expected)
    assert torch.equal(merged_weight(layer), expected)


def test_disabled_adapters_give_the_base_model(llama: nn.Module, ids: torch.Tensor) -> None:
    prepare(llama, IntGroup())
    base = llama(ids).logits
    model = adapted(llama)
    absorb_lora(model)
    assert not torch.equal(model(ids).logits, base)
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, base)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_dropout": 0.1}, "dropout.*0.1.*set it to 0"),
        ({"use_dora": True}, "variant Dora.*plain LoRA"),
        ({"lora_bias": True}, "lora_bias"),
    ],
)
def test_what_the_merged_weight_cannot_express_is_refused(settings: dict[str, Any], message: str) -> None:
    model = nn.Sequential(nn.Linear(32, 8))
    prepare(model, Int8Channel())
    model = get_peft_model(model, LoraConfig(target_modules=["0"], **settings))
    with pytest.raises(InputError, match=message):
        absorb_lora(model)
    assert "forward" not in vars(model.base_model.model[0])


def test_the_order_is_prepare_adapt_absorb_merge_convert(llama: nn.Module) -> None:
    model = adapted(llama)
    with pytest.raises(InputError, match="call prepare first"):
        absorb_lora(model)
    with pytest.raises(InputError, match="call prepare first"):
        prepare(model, IntGroup())
    llama = model.unload()
    prepare(llama, IntGroup())
    with pytest.raises(InputError, match="merge them first"):
        convert(adapted(llama))
