"""Rounded activations: their grids, their ranges, and that an engine reads what was trained."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from distill.core.errors import InputError
from distill.exporters.compressed_tensors import save
from distill.quantization import ACTIVATIONS, ActivationSpec, DynamicInt8, Int8Channel, IntGroup, StaticInt8
from distill.quantization.base import QuantizerSpec
from distill.quantization.calibrate import calibrate
from distill.quantization.convert import round_unquantized
from distill.quantization.fake_quant import InputQuantLinear, unquantized
from distill.quantization.lora import absorb_lora
from distill.quantization.prepare import prepare, unprepare
from distill.quantization.unpack import unpack

OBSERVERS = ("minmax", "moving_average", "percentile", "mse")


def ready(model: nn.Module, spec: QuantizerSpec, activations: ActivationSpec, ids: torch.Tensor) -> dict[str, float]:
    prepare(model, spec, activations=activations)
    return calibrate(model, [{"input_ids": ids}], lambda batch: model(**batch))


def test_dynamic_against_an_independent_computation() -> None:
    rows = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
    rows[1, 2] = 0
    got = DynamicInt8().quantize(rows, None)
    for row, rounded in zip(rows.view(-1, 16).tolist(), got.view(-1, 16).tolist(), strict=True):
        scale = torch.tensor(max(map(abs, row))).div(torch.tensor(127.5)).item() or 1.0
        codes = [max(-128, min(127, round(value / scale))) for value in row]
        assert rounded == pytest.approx([code * scale for code in codes], rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("spec", [DynamicInt8(), StaticInt8()], ids=lambda spec: spec.kind)
def test_the_gradient_passes_inside_the_range(spec: ActivationSpec) -> None:
    rows = torch.tensor([[0.5, -3.0, 1.0, 2.0]], requires_grad=True)
    upstream = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    scale = torch.tensor([1.5 / 127.5]) if spec.calibrated else None
    spec.quantize(rows, scale).backward(upstream)
    expected = [[1.0, 0.0, 3.0, 0.0]] if spec.calibrated else upstream.tolist()
    assert rows.grad.tolist() == expected


@pytest.mark.parametrize("weights", [Int8Channel(), IntGroup()], ids=lambda spec: spec.kind)
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_plain_transformers_computes_what_was_trained(
    llama: nn.Module, ids: torch.Tensor, tmp_path: Path, kind: str, weights: QuantizerSpec
) -> None:
    only_weights = _logits_with(llama, weights, ids)
    ready(llama, weights, ACTIVATIONS[kind](), ids)
    round_unquantized(llama, torch.bfloat16)
    trained = llama(ids).logits
    assert not torch.equal(trained, only_weights)
    save(llama, tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(loaded(ids).logits, trained)
    # and as our own loader hands it on: the rounding of the inputs is not lost
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert len(unpack(again)) == 14
    assert isinstance(again.model.layers[0].mlp.up_proj, InputQuantLinear)
    assert torch.equal(again(ids).logits, trained)


def _logits_with(llama: nn.Module, spec: QuantizerSpec, ids: torch.Tensor) -> torch.Tensor:
    prepare(llama, spec)
    logits = llama(ids).logits
    unprepare(llama)
    return logits


@pytest.mark.parametrize("observer", OBSERVERS)
def test_ranges_follow_the_observer_and_not_the_batches(llama: nn.Module, ids: torch.Tensor, observer: str) -> None:
    seen: dict[str, torch.Tensor] = {}
    layer = llama.model.layers[0].mlp.up_proj
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.update(x=inputs[0].detach()))
    llama(ids)
    handle.remove()
    x = seen["x"].abs()
    scales = ready(llama, Int8Channel(), StaticInt8(observer=observer), ids)
    got = scales["model.layers.0.mlp.up_proj"] * 127.5
    if observer == "minmax":
        assert got == pytest.approx(x.max().item(), rel=0.005)
    elif observer == "moving_average":
        assert got == pytest.approx((0.9 * x[0].max() + 0.1 * x[1].max()).item(), rel=0.005)
    elif observer == "percentile":
        assert got == pytest.approx(x.flatten().quantile(0.999).item(), rel=0.03)
    else:

        def error(extent: float) -> float:
            scale = torch.tensor([extent / 127.5])
            return (StaticInt8().quantize(seen["x"], scale) - seen["x"]).square().sum().item()

        best = min(error(x.max().item() * step / 100) for step in range(1, 101))
        assert error(got) <= 1.1 * best + 1e-9
    one_by_one = [{"input_ids": row[None]} for row in ids]
    assert calibrate(llama, one_by_one, lambda batch: llama(**batch)) == pytest.approx(scales, rel=0.01)


def test_padding_is_not_looked_at_and_a_prompt_is(llama: nn.Module, ids: torch.Tensor) -> None:
    prepare(llama, Int8Channel(), activations=StaticInt8(observer="minmax"))

    def scales(batch: dict[str, torch.Tensor]) -> dict[str, float]:
        return calibrate(llama, [batch], lambda b: llama(**b))

    expected = scales({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    padded = torch.cat([ids, torch.full((2, 5), 7)], 1)
    attended = torch.cat([torch.ones_like(ids), torch.zeros(2, 5, dtype=torch.long)], 1)
    assert scales({"input_ids": padded, "attention_mask": attended}) == pytest.approx(expected, rel=0.01)
    learned_from = torch.zeros_like(ids, dtype=torch.bool)
    assert calibrate(llama, [{"input_ids": ids, "mask": learned_from}], lambda b: llama(b["input_ids"])) == expected
    with pytest.raises(InputError, match="no finite input activation"):
        calibrate(llama, [], lambda batch: None)


def test_the_scale_survives_and_unquantized_and_unprepared_are_plain(llama: nn.Module, ids: torch.Tensor) -> None:
    plain = llama(ids).logits
    ready(llama, Int8Channel(), StaticInt8(), ids)
    quantized = llama(ids).logits
    assert not torch.equal(plain, quantized)
    with unquantized(llama):
        assert torch.equal(llama(ids).logits, plain)
    state = llama.state_dict()
    assert state["model.layers.0.mlp.up_proj.input_scale"].shape == (1,)
    unprepare(llama)
    assert torch.equal(llama(ids).logits, plain)
    assert "model.layers.0.mlp.up_proj.input_scale" not in llama.state_dict()
    prepare(llama, Int8Channel(), activations=StaticInt8())
    llama.load_state_dict(state)
    assert torch.equal(llama(ids).logits, quantized)


@pytest.mark.parametrize("targets", ["all-linear", ["up_proj"]])
@pytest.mark.parametrize("observer", OBSERVERS)
def test_ranges_under_adapters_are_those_of_the_model_below(
    llama: nn.Module, ids: torch.Tensor, observer: str, targets: str | list[str]
) -> None:
    """Adapters start as nothing, so the layers' inputs are what they are without."""
    expected = ready(llama, Int8Channel(), StaticInt8(observer=observer), ids)
    unprepare(llama)
    prepare(llama, Int8Channel(), activations=StaticInt8(observer=observer))
    adapted = get_peft_model(llama, LoraConfig(r=2, target_modules=targets))
    absorb_lora(adapted)
    assert calibrate(llama, [{"input_ids": ids}], lambda batch: llama(**batch)) == expected
    trained = adapted(ids).logits
    merged = adapted.merge_and_unload()
    assert merged.model.layers[0].mlp.up_proj.input_scale.item() == expected["model.layers.0.mlp.up_proj"]
    assert torch.equal(merged(ids).logits, trained)
