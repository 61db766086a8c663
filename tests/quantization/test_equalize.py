"""Scales folded into norms: the model stays what it is, and rounding costs it less where channels are uneven."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaForCausalLM

from distill.core.errors import InputError
from distill.quantization import DynamicInt8, Int8Channel, IntGroup
from distill.quantization.base import QuantizerSpec
from distill.quantization.equalize import Method, equalize
from distill.quantization.fake_quant import switch
from distill.quantization.inputs import ActivationSpec
from distill.quantization.prepare import prepare


@pytest.fixture
def uneven(llama: LlamaForCausalLM) -> LlamaForCausalLM:
    """Norms that make a few channels large, as trained models have them."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in llama.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight[torch.randint(64, (4,), generator=generator)] = 20.0
    return llama


def batches_of(length: int = 24) -> list[dict[str, Tensor]]:
    ids = torch.randint(0, 64, (8, length), generator=torch.Generator().manual_seed(7))
    return [{"input_ids": part} for part in ids.split(4)]


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(input_ids=batch["input_ids"]).logits


@torch.no_grad()
def kl(full: Tensor, other: Tensor) -> float:
    p, q = full.double().log_softmax(-1), other.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize(
    ("method", "grid", "inputs"),
    [("awq", IntGroup(), None), ("smooth_quant", Int8Channel(), DynamicInt8())],
)
def test_what_it_computes_stays_and_rounding_costs_less(
    uneven: LlamaForCausalLM, method: Method, grid: QuantizerSpec, inputs: ActivationSpec | None
) -> None:
    ids = torch.randint(0, 64, (8, 24), generator=torch.Generator().manual_seed(1))
    full = logits(uneven, {"input_ids": ids})
    plain = copy.deepcopy(uneven)
    prepare(plain, grid, activations=inputs)
    prepare(uneven, grid, activations=inputs)
    norms = equalize(uneven, batches_of(), partial(logits, uneven), method)
    assert norms == [f"model.layers.{i}.{n}_layernorm" for i in range(2) for n in ("input", "post_attention")]
    assert kl(full, logits(uneven, {"input_ids": ids})) < 0.7 * kl(full, logits(plain, {"input_ids": ids}))
    switch(uneven, enabled=False)
    torch.testing.assert_close(logits(uneven, {"input_ids": ids}), full, rtol=1e-3, atol=2e-3)  # of logits up to 20


def test_smooth_quant_against_the_formula(uneven: LlamaForCausalLM) -> None:
    seen: list[Tensor] = []
    layer = uneven.model.layers[0]
    handle = layer.input_layernorm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    batches = batches_of()
    for batch in batches:
        logits(uneven, batch)
    handle.remove()
    largest = torch.cat(seen).flatten(0, 1).abs().amax(0)
    weights = [getattr(layer.self_attn, name).weight for name in ("q_proj", "k_proj", "v_proj")]
    scale = (largest / torch.cat(weights).abs().amax(0)) ** 0.5
    norm, q_proj = layer.input_layernorm.weight / scale, weights[0] * scale
    prepare(uneven, Int8Channel())
    equalize(uneven, batches, partial(logits, uneven), "smooth_quant")
    torch.testing.assert_close(layer.input_layernorm.weight, norm)
    torch.testing.assert_close(layer.self_attn.q_proj.weight, q_proj)


def test_awq_lessens_the_error_of_the_outputs(uneven: LlamaForCausalLM) -> None:
    seen: list[Tensor] = []
    layer, grid = uneven.model.layers[0].mlp.up_proj, IntGroup(bits=3)
    handle = layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].flatten(0, 1)))
    for batch in batches_of():
        logits(uneven, batch)
    handle.remove()
    x, before = torch.cat(seen), layer.weight.detach().clone()
    prepare(uneven, grid)
    equalize(uneven, batches_of(), partial(logits, uneven), "awq")
    scale = (layer.weight / before)[0]
    torch.testing.assert_close(layer.weight, before * scale)  # a number a channel
    rounded = [grid.dequantize(grid.quantize(weight)) for weight in (before, layer.weight)]
    errors = [(x @ (weight - before).T).square().sum() for weight in (rounded[0], rounded[1] / scale)]
    assert errors[1] < 0.8 * errors[0]


def test_a_norm_that_something_else_reads_is_refused(uneven: LlamaForCausalLM) -> None:
    class Router(nn.Module):
        def __init__(self, mlp: nn.Module):
            super().__init__()
            self.mlp = mlp

        def forward(self, x: Tensor) -> Tensor:
            return self.mlp(x) + x.roll(1, -1)

    uneven.model.layers[0].mlp = Router(uneven.model.layers[0].mlp)
    prepare(uneven, IntGroup())
    with pytest.raises(InputError, match="another module than a linear layer reads a norm"):
        equalize(uneven, batches_of(), partial(logits, uneven), "awq")
    model = nn.Sequential(nn.Linear(32, 32))
    prepare(model, IntGroup())
    with pytest.raises(InputError, match="awq folds scales into the norms that quantized"):
        equalize(model, [{"x": torch.ones(1, 4, 32)}], lambda batch: model(batch["x"]), "awq")


@pytest.mark.parametrize("method", ["awq", "smooth_quant"])
def test_norms_that_store_their_weight_less_one(method: Method) -> None:
    """Gemma's: what is multiplied by is 1 + w, and folds as any other."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, initializer_range=0.2,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval().double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.randn(64, dtype=torch.float64) * 0.3)
                parameter[3] = 9.0
    batches = batches_of()
    full, before = logits(model, batches[0]), copy.deepcopy(model)
    prepare(model, Int8Channel())
    norms = equalize(model, batches, partial(logits, model), method)
    assert norms == [f"model.layers.{i}.{n}_layernorm" for i in range(2) for n in ("input", "pre_feedforward")]
    for norm, readers in ((norms[0], ("self_attn.q_proj", "self_attn.v_proj")), (norms[1], ("mlp.up_proj",))):
        new, old = (1 + m.get_submodule(norm).weight for m in (model, before))
        assert not torch.allclose(new, old)
        for reader in readers:
            path = f"model.layers.0.{reader}.weight"
            torch.testing.assert_close(
                model.get_parameter(path) * new, before.get_parameter(path) * old, rtol=1e-12, atol=0
            )
    switch(model, enabled=False)
    torch.testing.assert_close(logits(model, batches[0]), full, rtol=1e-4, atol=1e-4)  # Gemma's norms compute in fp32
