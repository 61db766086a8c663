import contextlib
import copy
import pickle

import pytest
import torch
from torch import nn

from distill.quantization import Int8Channel, IntGroup
from distill.quantization.base import QuantizerSpec
from distill.quantization.fake_quant import fake_quantize, unquantized
from distill.quantization.prepare import prepare

BOTH = [IntGroup(group_size=16), Int8Channel()]


@pytest.mark.parametrize("spec", BOTH, ids=lambda spec: spec.kind)
def test_forward_is_the_grid_and_gradient_goes_straight_through(spec: QuantizerSpec) -> None:
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    upstream = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
    out = fake_quantize(weight, spec)
    assert torch.equal(out, spec.dequantize(spec.quantize(weight)))
    assert not torch.equal(out, weight)
    out.backward(upstream)
    assert torch.equal(weight.grad, upstream)


@pytest.mark.parametrize("spec", BOTH, ids=lambda spec: spec.kind)
def test_layer_gradients_are_those_of_a_linear_layer_with_the_quantized_weight(spec: QuantizerSpec) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 8))
    plain = nn.Linear(32, 8)
    plain.load_state_dict({"weight": spec.dequantize(spec.quantize(model[0].weight)), "bias": model[0].bias})
    prepare(model, spec)
    x = torch.randn(4, 32, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    out, expected = model(x), plain(y)
    assert torch.equal(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(model[0].weight.grad, plain.weight.grad)
    assert torch.equal(model[0].bias.grad, plain.bias.grad)
    assert torch.equal(x.grad, y.grad)


def test_bfloat16_weights_keep_their_type() -> None:
    spec = IntGroup(group_size=16)
    weight = torch.randn(4, 32).bfloat16()
    assert torch.equal(fake_quantize(weight, spec), spec.dequantize(spec.quantize(weight)).bfloat16())


def test_unquantized_is_the_full_precision_model(llama: nn.Module, ids: torch.Tensor) -> None:
    full = llama(ids).logits
    prepare(llama, IntGroup())
    quantized = llama(ids).logits
    assert not torch.allclose(quantized, full, atol=1e-3)
    with unquantized(llama):
        assert torch.equal(llama(ids).logits, full)
    assert torch.equal(llama(ids).logits, quantized)
    with contextlib.suppress(RuntimeError), unquantized(llama):
        raise RuntimeError
    assert torch.equal(llama(ids).logits, quantized)


def test_prepared_models_can_be_copied_and_pickled(llama: nn.Module, ids: torch.Tensor) -> None:
    prepare(llama, IntGroup())
    expected = llama(ids).logits
    assert torch.equal(copy.deepcopy(llama)(ids).logits, expected)
    assert torch.equal(pickle.loads(pickle.dumps(llama))(ids).logits, expected)


@pytest.mark.parametrize("spec", BOTH, ids=lambda spec: spec.kind)
def test_a_large_weight_keeps_the_scale_that_it_is_given(spec: QuantizerSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """As gptq gives one to a quantizer that learns none; large weights are quantized some rows at a time."""
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    scale = 1.3 * spec.quantize(weight).scale.float()
    expected = fake_quantize(weight, spec, scale.log().flatten())
    plain = fake_quantize(weight, spec)
    monkeypatch.setattr("distill.quantization.fake_quant.LARGE", 64)
    assert torch.equal(fake_quantize(weight, spec, scale.log().flatten()), expected)
    assert torch.equal(fake_quantize(weight, spec), plain)
    assert not torch.equal(expected, plain)
