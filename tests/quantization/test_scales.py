"""Scales that stay (what the codes are then, where the gradient passes, how they are restored) or begin anew."""

import copy
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from distill.quantization import QUANTIZERS, Int8Channel, IntGroup
from distill.quantization.base import QuantizerSpec
from distill.quantization.convert import convert
from distill.quantization.fake_quant import fake_quant_layers
from distill.quantization.lora import absorb_lora
from distill.quantization.prepare import prepare, unprepare
from distill.quantization.scales import allocate_held_scales, hold_scales, reset_learned_scales

GRIDS: dict[str, QuantizerSpec] = {
    **{kind: member() for kind, member in QUANTIZERS.items()},
    "asymmetric": IntGroup(symmetry="asymmetric"),
    "asymmetric_mse": IntGroup(bits=2, symmetry="asymmetric", scale="mse"),
    "mse": IntGroup(bits=3, scale="mse"),
    "learned": IntGroup(bits=3, scale="learned"),
}
STRAIGHT = {"ternary", "binary"}


def moved(spec: QuantizerSpec) -> nn.Sequential:
    """A layer whose weight has changed a good deal since its scale was held; a few weights have left the range."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 8, bias=False))
    prepare(model, spec)
    hold_scales(model)
    with torch.no_grad():
        model[0].weight.mul_(0.7).add_(torch.randn(8, 256), alpha=0.01)
        model[0].weight[:, ::37] *= 3
    return model


@pytest.mark.parametrize("name", GRIDS)
def test_the_scale_stays_and_weights_beyond_it_clip(name: str) -> None:
    spec = GRIDS[name]
    torch.manual_seed(0)
    before = spec.quantize(nn.Linear(256, 8, bias=False).weight)
    model = moved(spec)
    codes, weight = model[0].codes(), model[0].weight.detach()
    assert torch.equal(codes.scale, before.scale)
    if before.zero_point is not None:
        assert torch.equal(codes.zero_point, before.zero_point)
    assert not torch.equal(spec.quantize(weight).scale, before.scale)
    scale = before.scale.double().repeat_interleave(256 // before.scale.shape[-1], 1)
    zero = 0 if before.zero_point is None else before.zero_point.double().repeat_interleave(256 // spec.groups(256), 1)
    exact = weight.double() / scale + zero
    limits = spec.limits()
    # what is rounded by no more than half a step is not clipped, but for LSQ, where the last code is the end
    inside = torch.ones_like(exact, dtype=torch.bool)
    if limits is not None:
        half = 16.0 if name == "fp8" else 0.5
        ends = limits if spec.clips else [(code + math.copysign(half, code)) * 257 / 256 for code in limits]
        inside = (exact >= ends[0]) & (exact <= ends[1])
    if limits is not None:
        assert 0 < (~inside).sum() < 0.2 * inside.numel()
        if name != "fp8":
            nearest = exact.clamp(*limits).round()
            # at halves fp32 and fp64 may differ
            assert ((codes.values.double() - nearest).abs() <= ((exact * 2 - (exact * 2).round()).abs() < 1e-3)).all()
    out = model(torch.eye(256))
    assert torch.equal(out.T, spec.dequantize(codes))
    assert torch.equal(convert(model)["0"].values.float(), codes.values.float())
    upstream = torch.randn(256, 8)
    out.backward(upstream)
    assert torch.equal(model[0].weight.grad, upstream.T * inside)
    assert (name in STRAIGHT) == (limits is None)
    if model[0].log_scale is not None:
        assert not model[0].log_scale.grad.any()


@pytest.mark.parametrize("name", ["int_group", "int8_channel", "asymmetric", "q8_0", "tq2_0", "fp8"])
def test_weights_that_have_not_grown_keep_their_gradient(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 8, bias=False))
    prepare(model, GRIDS[name])
    hold_scales(model)
    model(torch.eye(256)).sum().backward()
    assert (model[0].weight.grad == 0).double().mean() < 0.002  # an asymmetric range may end a little early


def test_a_learned_scale_is_held_as_it_was_learned() -> None:
    model = nn.Sequential(nn.Linear(64, 4))
    prepare(model, GRIDS["learned"])
    with torch.no_grad():
        model[0].log_scale += 0.3
    learned = model[0].codes()
    hold_scales(model)
    with torch.no_grad():
        model[0].log_scale += 1.0  # what an optimizer's momentum may still do
    assert torch.equal(model[0].codes().scale, learned.scale)
    assert torch.equal(model[0].codes().values, learned.values)


def test_with_adapters_it_is_the_scale_of_the_merged_weight(llama: nn.Module, ids: torch.Tensor) -> None:
    prepare(llama, IntGroup())
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(llama, config).eval()
    absorb_lora(model)
    trained = model(ids).logits
    hold_scales(llama)
    assert torch.equal(model(ids).logits, trained)
    scales = {name.replace(".base_layer", ""): layer.held()[0] for name, layer in fake_quant_layers(llama).items()}
    merged = model.merge_and_unload()
    for name, layer in fake_quant_layers(merged).items():
        assert torch.equal(layer.spec.quantize(layer.weight).scale, scales[name])
    assert torch.equal(merged(ids).logits, trained)


def test_a_renewed_scale_is_that_of_the_merged_weight(llama: nn.Module) -> None:
    prepare(llama, GRIDS["learned"])
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(llama, config).eval()
    absorb_lora(model)
    stale = {name: layer.log_scale.clone() for name, layer in fake_quant_layers(llama).items()}
    reset_learned_scales(llama)
    learned = {name: layer.log_scale.clone() for name, layer in fake_quant_layers(llama).items()}
    for name, layer in fake_quant_layers(model.merge_and_unload()).items():
        found = next(scale for key, scale in learned.items() if key.replace(".base_layer", "") == name)
        assert torch.equal(found, layer.spec.initial_scale(layer.weight).log().flatten())
    changed = {name for name, scale in learned.items() if not torch.equal(scale, stale[name])}
    assert changed == {name for name in learned if name.endswith(("q_proj.base_layer", "down_proj.base_layer"))}


@pytest.mark.parametrize("name", ["q8_0", "asymmetric", "learned"])
def test_the_state_finds_back_and_no_cast_rounds_it(name: str) -> None:
    model = moved(GRIDS[name])
    other = copy.deepcopy(model)
    unprepare(other)
    assert list(other.state_dict()) == ["0.weight"]
    prepare(other, GRIDS[name])
    assert not allocate_held_scales(other, {"0.weight": model[0].weight})
    state = {f"student.{key}": tensor for key, tensor in model.state_dict().items()}
    assert allocate_held_scales(other, state, "student.")
    other.to(torch.bfloat16)  # as a trainer in that precision does between the two
    other.to(torch.float32)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(torch.eye(256)), model(torch.eye(256)))
    other.to(torch.bfloat16)
    assert torch.equal(other[0].held()[0], model[0].held()[0])


def test_an_embedding_is_held_too() -> None:
    model = nn.Sequential(nn.Embedding(8, 32))
    prepare(model, Int8Channel(include=("0",)))
    before = model[0].codes().scale
    hold_scales(model)
    with torch.no_grad():
        model[0].weight *= 0.5
    assert torch.equal(model[0].codes().scale, before)


def test_a_compiled_layer_follows() -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(32, 4))
    prepare(model, GRIDS["learned"])
    compiled = torch.compile(model, backend="eager")
    x = torch.eye(32)
    assert torch.equal(compiled(x), model(x))
    hold_scales(model)
    with torch.no_grad():
        model[0].weight *= 2
    assert torch.equal(compiled(x), model(x))
    compiled(x).sum().backward()
    assert (model[0].weight.grad == 0).any()
    assert not model[0].log_scale.grad.any()
    torch._dynamo.reset()
