"""Every quantizer through the same tests: what is trained is what is shipped, whatever the grid."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from distill.core.errors import InputError
from distill.quantization import QUANTIZERS, Binary, Int8Channel, IntGroup, Ternary
from distill.quantization.base import QuantizerSpec
from distill.quantization.convert import convert
from distill.quantization.fake_quant import fake_quant_layers, unquantized
from distill.quantization.lora import absorb_lora
from distill.quantization.prepare import prepare, unprepare

VARIANTS: dict[str, QuantizerSpec] = {
    **{kind: member() for kind, member in QUANTIZERS.items()},
    **{f"int{bits}": IntGroup(bits=bits) for bits in (2, 3, 5, 6, 8)},
    **{f"int{bits}_asymmetric": IntGroup(bits=bits, symmetry="asymmetric") for bits in (2, 4, 8)},
    "int4_mse": IntGroup(scale="mse"),
    "int2_asymmetric_mse": IntGroup(bits=2, symmetry="asymmetric", scale="mse"),
    "int8_channel_mse": Int8Channel(scale="mse"),
    "int4_learned": IntGroup(scale="learned"),
    "int2_learned": IntGroup(bits=2, scale="learned"),
    "int8_channel_learned": Int8Channel(scale="learned"),
    "ternary_group": Ternary(group_size=256),
    "binary_wide": Binary(group_size=256),
}
SAME_AGAIN = {"q8_0", "q4_0", "tq2_0", "binary", "binary_wide"}
"""Grids on which a dequantized weight has its own codes and scale, so that nothing is lost by quantizing it again."""
each = pytest.mark.parametrize("name", VARIANTS)


@pytest.fixture
def llama() -> LlamaForCausalLM:
    """Widths that every block divides, and weights so wide that rounding shows."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=512, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))


def weight_of(rows: int = 8, columns: int = 512, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@each
def test_codes_have_the_shapes_and_types_that_exporters_expect(name):
    spec, weight = VARIANTS[name], weight_of()
    codes = spec.quantize(weight)
    assert codes.values.shape == weight.shape
    assert codes.values.dtype == (torch.float8_e4m3fn if name == "fp8" else torch.int8)
    assert codes.scale.shape == (8, spec.groups(512))
    assert codes.scale.dtype == getattr(torch, spec.scale_dtype)
    if codes.zero_point is not None:
        assert codes.zero_point.shape == codes.scale.shape
        assert codes.zero_point.dtype == torch.int8
    dequantized = spec.dequantize(codes)
    assert dequantized.dtype == torch.float32
    # nothing is rounded on the way back: fp64 says the same
    scale = codes.scale.double().repeat_interleave(512 // codes.scale.shape[1], 1)
    zero = (
        0 if codes.zero_point is None else codes.zero_point.double().repeat_interleave(512 // codes.scale.shape[1], 1)
    )
    assert torch.equal(dequantized.double(), (codes.values.double() - zero) * scale)


@each
def test_the_nearest_point_of_the_grid_is_taken(name):
    """By brute force over all codes of a group's scale; the outermost codes also stand for what lies beyond."""
    spec, weight = VARIANTS[name], weight_of(2, 256, seed=3)
    if name == "fp8":
        pytest.skip("256 codes that are no integers; compared with torch's own cast in its own test")
    codes = spec.quantize(weight)
    scale = codes.scale.float().repeat_interleave(256 // codes.scale.shape[1], 1)
    low, high = int(codes.values.min()), int(codes.values.max())
    zero = torch.zeros(1) if codes.zero_point is None else codes.zero_point.float().repeat_interleave(
        256 // codes.scale.shape[1], 1
    )  # fmt: skip
    every = torch.tensor([-1, 1]) if name.startswith("binary") else torch.arange(low, high + 1)
    points = (every - zero.unsqueeze(-1)) * scale.unsqueeze(-1)
    least = (points - weight.unsqueeze(-1)).abs().amin(-1)
    # GGUF rounds the scale after the codes are made: half a step and the rounding of the scale
    slack = scale.abs() * 0.005 * max(1, high) + 1e-6
    assert ((spec.dequantize(codes) - weight).abs() <= least + slack).all()


@each
def test_quantizing_again_on_the_same_scale_gives_the_same_codes(name):
    spec = VARIANTS[name]
    codes = spec.quantize(weight_of(seed=4))
    if codes.zero_point is None:
        again = spec.quantize(spec.dequantize(codes), scale=codes.scale)
        assert torch.equal(again.values.float(), codes.values.float())
        assert torch.equal(again.scale, codes.scale)


@each
def test_grids_that_lose_nothing_when_quantized_again(name):
    spec = VARIANTS[name]
    codes = spec.quantize(weight_of(32, 512, seed=5))
    again = spec.quantize(spec.dequantize(codes))
    same = torch.equal(again.values.float(), codes.values.float()) and torch.equal(again.scale, codes.scale)
    assert same or name not in SAME_AGAIN


@each
def test_forward_is_the_grid_and_the_gradient_that_of_its_weight(name):
    spec = VARIANTS[name]
    torch.manual_seed(0)
    model, plain = nn.Sequential(nn.Linear(256, 8)), nn.Linear(256, 8)
    prepare(model, spec)
    plain.load_state_dict({"weight": spec.dequantize(model[0].codes()), "bias": model[0].bias})
    x = torch.randn(4, 256, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    out, expected = model(x), plain(y)
    assert torch.equal(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(model[0].bias.grad, plain.bias.grad)
    assert torch.equal(x.grad, y.grad)
    got, straight = model[0].weight.grad, plain.weight.grad
    passed = got == straight
    assert ((got == 0) | passed).all()
    if not spec.clips:
        assert passed.all()
    assert (model[0].log_scale is not None) == ("learned" in name)
    if model[0].log_scale is not None:
        assert model[0].log_scale.grad.abs().max() > 0


@each
def test_what_was_trained_is_what_is_converted(name, llama, ids):
    spec = VARIANTS[name]
    names = prepare(llama.train(), spec)
    optimizer = torch.optim.AdamW(llama.parameters(), lr=2e-3)
    losses = []
    for _ in range(3):
        loss = functional.cross_entropy(llama(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    if any("log_scale" in key for key in llama.state_dict()):
        assert all(layer.log_scale.grad.abs().max() > 0 for layer in fake_quant_layers(llama).values())
    trained = llama.eval()(ids).logits
    codes = convert(llama)
    assert list(codes) == names
    unprepare(llama)
    assert not torch.equal(llama(ids).logits, trained)
    with torch.no_grad():
        for layer, layer_codes in codes.items():
            llama.get_submodule(layer).weight.copy_(spec.dequantize(layer_codes))
    assert torch.equal(llama(ids).logits, trained)


@each
def test_adapters_fold_without_changing_a_bit(name, llama, ids):
    spec = VARIANTS[name]
    prepare(llama, spec)
    model = get_peft_model(llama, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
    absorb_lora(model)
    trained = model(ids).logits
    merged = model.merge_and_unload()
    assert torch.equal(merged(ids).logits, trained)
    codes = convert(merged)
    unprepare(merged)
    with torch.no_grad():
        for layer, layer_codes in codes.items():
            merged.get_submodule(layer).weight.copy_(spec.dequantize(layer_codes))
    assert torch.equal(merged(ids).logits, trained)


@each
def test_the_state_survives_and_unquantized_is_the_plain_model(name, llama, ids):
    spec = VARIANTS[name]
    full, other = llama(ids).logits, copy.deepcopy(llama)
    prepare(llama, spec)
    quantized = llama(ids).logits
    assert not torch.equal(quantized, full)
    with unquantized(llama):
        assert torch.equal(llama(ids).logits, full)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    prepare(other, spec)
    other.load_state_dict(llama.state_dict())
    assert torch.equal(other(ids).logits, quantized)


@each
def test_a_zero_stays_zero_where_the_grid_says_so(name):
    spec, weight = VARIANTS[name], weight_of()
    weight[:, ::3] = 0
    dequantized = spec.dequantize(spec.quantize(weight))
    assert (dequantized[:, ::3] == 0).all() == spec.keeps_zero


@each
@pytest.mark.parametrize("case", ["zeros", "outlier", "tiny", "constant"])
def test_hard_weights_stay_finite(name, case):
    spec, weight = VARIANTS[name], torch.zeros(3, 256)
    if case == "outlier":
        weight = weight_of(3, 256) * 0.01
        weight[1, 7] = -30.0
    elif case == "tiny":
        weight = weight_of(3, 256) * 1e-30
    elif case == "constant":
        weight = torch.full((3, 256), -0.25)
    dequantized = spec.dequantize(spec.quantize(weight))
    assert dequantized.isfinite().all()
    if case == "zeros" or (case == "tiny" and spec.scale_dtype == "float16"):
        assert dequantized.abs().max() <= 1e-6
    if case == "outlier" and "ternary" not in name and "binary" not in name and not spec.clips:
        assert dequantized[1, 7].item() == pytest.approx(-30.0, rel=0.4)  # half a step of int2


@each
def test_bfloat16_weights_and_a_bfloat16_forward(name):
    spec = VARIANTS[name]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 8, dtype=torch.bfloat16))
    weight = model[0].weight.detach().clone()
    prepare(model, spec)
    x = torch.randn(4, 256, dtype=torch.bfloat16)
    assert torch.equal(model[0].weight, weight)
    expected = functional.linear(x, spec.dequantize(model[0].codes()).bfloat16(), model[0].bias)
    assert torch.equal(model(x), expected)
    model(x).sum().backward()
    assert model[0].weight.grad.dtype == torch.bfloat16


@each
def test_a_row_that_the_groups_do_not_divide_is_refused_with_a_way_out(name):
    spec = VARIANTS[name]
    if spec.groups(1024) != 1:
        with pytest.raises(InputError, match=r"(divide|multiple of).*(try|skip)"):
            spec.groups(40)
    else:
        assert spec.groups(40) == 1


@each
def test_tells_its_name_and_its_words_for_the_formats(name):
    spec = VARIANTS[name]
    assert spec.label()
    assert spec.gguf_type in (None, "Q8_0", "Q6_K", "Q4_0", "TQ2_0")
    assert (spec.gguf_type is None) or spec.scale_dtype == ("float32" if spec.gguf_type == "Q6_K" else "float16")
    words = spec.compressed_tensors_arguments()
    assert json.loads(json.dumps(words)) == words
    assert words["symmetric"] == (spec.quantize(weight_of()).zero_point is None)


def test_labels_tell_the_variants_apart():
    assert len({spec.label() for spec in VARIANTS.values()}) == len(set(map(repr, VARIANTS.values())))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_gradients_of_a_learned_scale_are_those_of_the_source(bits):
    """Against its definition by autograd, in fp64: v clipped, then rounded with a straight-through gradient."""
    spec = IntGroup(bits=bits, group_size=16, scale="learned")
    weight, upstream = weight_of(4, 32), weight_of(4, 32, seed=9)
    low, high = spec.limits()
    scale = (weight.unflatten(-1, (2, 16)).abs().mean(-1) / high**0.5).bfloat16()
    to_weight, to_scale = spec.gradients(weight, scale, None, upstream)
    w, s = weight.double().requires_grad_(), scale.double().requires_grad_()
    clipped = (w.unflatten(-1, (2, 16)) / s.unsqueeze(-1)).clamp(low, high)
    rounded = (clipped.round() - clipped).detach() + clipped
    ((rounded * s.unsqueeze(-1)).flatten(-2) * upstream).sum().backward()
    torch.testing.assert_close(to_scale.double(), s.grad / (16 * high) ** 0.5, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(to_weight.double(), w.grad, rtol=1e-5, atol=1e-6)
    assert (to_weight == 0).any() == (bits < 8)


def test_a_learned_scale_starts_at_the_least_error_and_finds_back_to_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16, bias=False))
    weight = model[0].weight.detach().clone()
    prepare(model, IntGroup(bits=3, scale="learned"))
    layer = model[0]
    codes, searched = layer.codes(), IntGroup(bits=3, scale="mse").quantize(weight)
    assert torch.equal(codes.values, searched.values)
    assert torch.equal(codes.scale, searched.scale)
    layer.log_scale.data += 0.7
    optimizer = torch.optim.Adam([layer.log_scale], lr=0.02)
    errors = []
    for _ in range(30):
        error = (layer.effective(layer.weight.detach()) - weight).square().sum()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < 0.6 * errors[0]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetry", ["symmetric", "asymmetric"])
def test_codes_are_torchs_fake_quantize_where_the_scale_is_exact(bits, symmetry):
    spec = IntGroup(bits=bits, group_size=64, symmetry=symmetry)
    low, high = spec.limits()
    step = 2.0**-6
    inside = torch.rand(5, 64, generator=torch.Generator().manual_seed(0))
    if symmetry == "symmetric":
        weight = (inside - 0.5) * (high - low) * step
        weight[:, 0] = -(high - low) / 2 * step
    else:
        weight = (inside * (high - low) - 1) * step
        weight[:, 0], weight[:, 1] = -step, (high - low - 1) * step
    codes = spec.quantize(weight)
    assert codes.scale.tolist() == [[step]] * 5
    zero = torch.zeros(5) if codes.zero_point is None else codes.zero_point[:, 0]
    assert zero.tolist() == [0 if symmetry == "symmetric" else low + 1] * 5
    expected = torch.fake_quantize_per_channel_affine(weight, torch.full((5,), step), zero.int(), 0, low, high)
    assert torch.equal(spec.dequantize(codes), expected)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetry", ["symmetric", "asymmetric"])
def test_the_searched_range_has_less_error_than_the_widest_and_is_near_the_best(bits, symmetry):
    weight = weight_of(16, 64, seed=2)

    def error(scale):
        spec = IntGroup(bits=bits, symmetry=symmetry, scale=scale)
        return (spec.dequantize(spec.quantize(weight)) - weight).square().sum()

    assert error("mse") < 0.97 * error("absmax")
    if symmetry == "symmetric":
        spec = IntGroup(bits=bits)
        widest = spec.quantize(weight).scale.float()
        tries = [spec.quantize(weight, scale=widest * share / 200) for share in range(20, 201)]
        errors = torch.stack([(spec.dequantize(t) - weight).view(16, 2, 32).square().sum(-1) for t in tries])
        assert error("mse") <= 1.1 * errors.amin(0).sum()


def test_the_blocks_of_gguf_are_those_of_its_own_package():
    quants = pytest.importorskip("gguf.quants", reason="pip install gguf to compare with its quantizers")
    from gguf import GGMLQuantizationType as Types

    for seed, kind in enumerate(("q8_0", "q4_0", "tq2_0")):
        spec, weight = QUANTIZERS[kind](), weight_of(16, 512, seed=seed)
        weight[3] = 0
        weight[4, :256] *= 1e-5
        weight[5, 32:64] = torch.tensor([0.5, -0.5]).repeat(16)  # ties
        data = quants.quantize(weight.numpy(), getattr(Types, spec.gguf_type))
        expected = torch.from_numpy(quants.dequantize(data, getattr(Types, spec.gguf_type)))
        assert torch.equal(spec.dequantize(spec.quantize(weight)), expected)


@pytest.mark.parametrize("spec", [Ternary(), Ternary(group_size=256), Binary(group_size=256)], ids=repr)
def test_ternary_codes_go_into_gguf_as_they_are(spec):
    weight = weight_of(8, 512)
    exact = spec.dequantize(spec.quantize(weight))
    blocks = QUANTIZERS["tq2_0"]()
    assert torch.equal(blocks.dequantize(blocks.quantize(exact)), exact)


def test_the_rounding_of_gguf_written_out():
    """Without its package: halves away from zero at 8 bits, the signed maximum on code -8 at 4 bits."""
    weight = torch.zeros(1, 32)
    weight[0, :4] = torch.tensor([127.0, 0.5, -0.5, 2.5])
    codes = QUANTIZERS["q8_0"]().quantize(weight)
    assert codes.scale.item() == 1
    assert codes.values[0, :5].tolist() == [127, 1, -1, 3, 0]
    weight[0, :4] = torch.tensor([8.0, -8.0, 1.5, -0.4])
    codes = QUANTIZERS["q4_0"]().quantize(weight)
    assert codes.scale.item() == -1
    assert codes.values[0, :5].tolist() == [-8, 7, -1, 0, 0]


def test_ternary_and_fp8_against_independent_computations():
    weight = weight_of(4, 256)
    scale = weight.double().abs().mean().half().item()
    expected = [[max(-1, min(1, round(value / scale))) for value in row] for row in weight.tolist()]
    assert Ternary().quantize(weight).values.tolist() == expected
    codes = QUANTIZERS["fp8"]().quantize(weight)
    steps = (codes.scale.float() * codes.values.float() - weight).abs() / weight.abs().clamp(min=1e-3)
    assert steps.max() <= 2**-4 + 2**-9  # half of the last of three bits
