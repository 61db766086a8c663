import copy

import pytest
import torch
from torch import nn

from distill.core.errors import InputError
from distill.quantization import Int8Channel, IntGroup
from distill.quantization.base import QuantizerSpec
from distill.quantization.convert import convert
from distill.quantization.fake_quant import fake_quant_layers
from distill.quantization.gptq import gptq
from distill.quantization.prepare import prepare

SPECS = [IntGroup(group_size=16), IntGroup(bits=2, scale="mse"), Int8Channel()]


def correlated(num_rows: int = 400, width: int = 64) -> torch.Tensor:
    """Inputs with a few strong directions, where it pays to make up for errors."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(width, width, generator=generator) * torch.logspace(0, -2, width)
    return torch.randn(num_rows, width, generator=generator) @ mix.T


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.label())
def test_the_output_is_nearer_than_by_rounding_to_nearest(spec: QuantizerSpec) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32))
    x = correlated()
    full = model(x)
    prepare(model, spec)
    nearest = (model(x) - full).square().sum()
    assert gptq(model, [{"x": x}], lambda batch: model(batch["x"])) == ["0"]
    assert (model(x) - full).square().sum() < 0.6 * nearest
    codes = convert(model)["0"]
    assert torch.equal(spec.dequantize(codes), model[0].weight)
    assert codes.scale.dtype == torch.bfloat16


def test_columns_against_the_source_written_out() -> None:
    """Two columns by hand, in fp64: the second is moved by the first one's error before it is rounded."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 3, bias=False))
    weight = model[0].weight.detach().double()
    x = correlated(50, 16)
    prepare(model, IntGroup(group_size=16))
    scale = model[0].codes().scale.double()[:, 0]
    gptq(model, [{"x": x}], lambda batch: model(batch["x"]))
    h = x.double().T @ x.double()
    h += 0.01 * h.diagonal().mean() * torch.eye(16)
    left, moved = h.clone(), weight.clone()
    for column in range(2):
        rounded = (moved[:, column] / scale).round().clamp(-8, 7) * scale
        torch.testing.assert_close(model[0].weight[:, column].double(), rounded, rtol=1e-6, atol=1e-9)
        # the least change of the output over the columns that are left: minus H_RR^-1 H_Rj times the error's opposite
        rest = torch.arange(column + 1, 16)
        solved = torch.linalg.solve(left[rest][:, rest], left[rest, column])
        moved[:, rest] += (moved[:, column] - rounded)[:, None] * solved
        moved[:, column] = rounded


def test_a_whole_model_is_nearer_and_converts_to_what_it_computes(llama: nn.Module, ids: torch.Tensor) -> None:
    calibration = torch.randint(0, 64, (24, 16), generator=torch.Generator().manual_seed(7))
    full = llama(calibration).logits.log_softmax(-1)

    def kl(model: nn.Module) -> torch.Tensor:
        return (full.exp() * (full - model(calibration).logits.log_softmax(-1))).sum(-1).mean()

    nearest = copy.deepcopy(llama)
    prepare(nearest, IntGroup())
    names = prepare(llama, IntGroup())
    batches = [{"input_ids": part} for part in calibration.split(8)]
    assert gptq(llama, batches, lambda batch: llama(**batch)) == names
    assert kl(llama) < kl(nearest)
    rounded = llama(ids).logits
    codes = convert(llama)
    with torch.no_grad():
        for name, layer in fake_quant_layers(llama).items():
            assert torch.equal(layer.spec.dequantize(codes[name]), layer.weight)
            layer.enabled = False
    assert torch.equal(llama(ids).logits, rounded)


def test_a_learned_scale_starts_with_the_same_codes_and_keeps_what_was_rounded_away() -> None:
    torch.manual_seed(0)
    shipped = nn.Sequential(nn.Linear(64, 32))
    trained, x = copy.deepcopy(shipped), correlated()
    for model, scale in ((shipped, "mse"), (trained, "learned")):
        prepare(model, IntGroup(bits=3, scale=scale))
        gptq(model, [{"x": x}], lambda batch, model=model: model(batch["x"]))
    assert torch.equal(trained(x), shipped(x))
    assert torch.equal(shipped[0].effective(shipped[0].weight), shipped[0].weight)
    assert not torch.equal(trained[0].effective(trained[0].weight), trained[0].weight)
    trained(x).square().sum().backward()
    assert trained[0].log_scale.grad.abs().min() > 0
    assert shipped[0].log_scale.requires_grad is False


def test_inputs_that_are_always_zero_and_padding() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 4))
    prepare(model, IntGroup())
    x = correlated(60, 32).view(6, 10, 32)
    x[..., 5] = 0
    other = copy.deepcopy(model)
    gptq(model, [{"x": x}], lambda batch: model(batch["x"]))
    assert model[0].weight.isfinite().all()
    padded = torch.cat([x, torch.full((6, 3, 32), 9.0)], 1)
    attended = torch.tensor([1] * 10 + [0] * 3).expand(6, 13)
    gptq(other, [{"x": padded, "attention_mask": attended}], lambda batch: other(batch["x"]))
    assert torch.equal(other[0].weight, model[0].weight)


def test_grids_that_it_cannot_round_to_are_refused(llama: nn.Module) -> None:
    prepare(llama, IntGroup(symmetry="asymmetric"))
    with pytest.raises(
        InputError,
        match=r"q_proj: rounding: gptq supports symmetric integer quantizers .got int4.*use rounding: nearest",
    ):
        gptq(llama, [], lambda batch: None)
