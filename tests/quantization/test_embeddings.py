"""Embeddings and head on a grid of their own: one weight, one set of codes, gradients of both uses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from distill.core.errors import InputError
from distill.losses import ForwardKL
from distill.losses.head_losses import Signal, head_losses
from distill.models.head import check_head, hidden_states, output_head
from distill.quantization import Q40, Q80, Fp8, Int8Channel, IntGroup, Ternary
from distill.quantization.convert import convert
from distill.quantization.embeddings import embeddings_grid
from distill.quantization.fake_quant import FakeQuantEmbedding, FakeQuantLinear, fake_quant_layers, unquantized
from distill.quantization.gptq import gptq
from distill.quantization.prepare import prepare, unprepare
from distill.quantization.scales import allocate_held_scales, hold_scales

ENDS = ("model.embed_tokens", "lm_head")


def make(name: str) -> PreTrainedModel:
    """One wide layer: llama (untied), qwen3 (tied), gemma3 (tied, and its embeddings scale what they look up)."""
    sizes: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "initializer_range": 0.2,
    }  # fmt: skip
    torch.manual_seed(0)
    if name == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    if name == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=16, tie_word_embeddings=True)).eval()
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return Gemma3ForCausalLM(Gemma3TextConfig(**sizes, **ids, head_dim=16)).eval()


each = pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])


@each
def test_lookup_and_head_read_the_same_codes(name: str, ids: torch.Tensor) -> None:
    model = make(name)
    plain, full = copy.deepcopy(model), model(ids).logits
    names = prepare(model, Q40(), embeddings=Q80())
    assert {*ENDS} <= {*names}
    assert isinstance(model.get_input_embeddings(), FakeQuantEmbedding)
    assert isinstance(model.get_output_embeddings(), FakeQuantLinear)
    codes = convert(model)
    if name != "llama":
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert torch.equal(codes[ENDS[0]].values, codes[ENDS[1]].values)
        assert torch.equal(codes[ENDS[0]].scale, codes[ENDS[1]].scale)
    with torch.no_grad():
        for layer, layer_codes in codes.items():
            plain.get_submodule(layer).weight.copy_(Q80().dequantize(layer_codes))
    assert torch.equal(model(ids).logits, plain(ids).logits)
    assert not torch.equal(model(ids).logits, full)
    with unquantized(model):
        assert torch.equal(model(ids).logits, full)
    check_head(model)
    assert unprepare(model) == names
    assert torch.equal(model(ids).logits, full)
    assert type(model.get_input_embeddings()) is type(plain.get_input_embeddings())


@each
def test_the_gradient_is_that_of_the_plain_model_on_the_dequantized_weights(name: str, ids: torch.Tensor) -> None:
    """Straight through both uses, in the model's own forward and in the chunked head of the losses."""
    model, teacher = make(name), make(name)
    prepare(model, IntGroup(group_size=16), embeddings=IntGroup(bits=8))
    plain = make(name)
    with torch.no_grad():
        for layer, codes in convert(model).items():
            plain.get_submodule(layer).weight.copy_(IntGroup().dequantize(codes))
        for parameter in teacher.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
        signal = Signal(hidden_states(teacher, ids), output_head(teacher))
    targets, mask = ids.roll(-1, 1), torch.ones_like(ids, dtype=torch.bool)
    for student in (model, plain):
        loss, _ = head_losses(
            hidden_states(student, ids), output_head(student), signal, targets, mask, [("kl", ForwardKL())],
            chunk_tokens=5,
        )  # fmt: skip
        loss.backward()
    reference = {key: parameter.grad for key, parameter in plain.named_parameters()}
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, reference[key], rtol=1e-6, atol=1e-7)
    by_autograd = functional.kl_div(
        plain(ids).logits.flatten(0, 1).log_softmax(-1), teacher(ids).logits.flatten(0, 1).log_softmax(-1),
        reduction="sum", log_target=True,
    )  # fmt: skip
    plain.zero_grad()
    by_autograd.backward()
    weight = model.model.embed_tokens.weight
    torch.testing.assert_close(weight.grad, plain.model.embed_tokens.weight.grad, rtol=1e-3, atol=1e-5)


def test_a_tied_weight_has_one_learned_scale(ids: torch.Tensor) -> None:
    model = make("qwen3")
    prepare(model, IntGroup(bits=3, scale="learned", include=("embed_tokens",)))
    head, embedding = model.lm_head, model.model.embed_tokens
    assert head.log_scale is embedding.log_scale
    model(ids).logits.square().sum().backward()
    both = embedding.log_scale.grad.clone()
    model.zero_grad()
    head(torch.randn(4, 32)).sum().backward()
    assert head.log_scale.grad.abs().max() > 0
    assert not torch.equal(both, head.log_scale.grad)


@each
def test_fixed_scales_are_part_of_the_state(name: str, ids: torch.Tensor) -> None:
    model, other = make(name), make(name)
    prepare(model, Q40(), embeddings=Q80())
    prepare(other, Q40(), embeddings=Q80())
    hold_scales(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    state = model.state_dict()
    assert allocate_held_scales(other, state)
    other.load_state_dict(state)
    assert torch.equal(other(ids).logits, model(ids).logits)
    assert torch.equal(convert(other)[ENDS[1]].values, convert(model)[ENDS[1]].values)


def test_a_scale_of_the_whole_matrix_is_not_taken_from_the_rows_that_are_read(ids: torch.Tensor) -> None:
    model, spec = make("llama"), Ternary(include=("embed_tokens",))
    rows = spec.dequantize(spec.quantize(model.model.embed_tokens.weight))
    prepare(model, spec)
    assert torch.equal(model.model.embed_tokens(ids), rows[ids])


def test_many_rows_are_quantized_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(70, 32)
    layer = nn.Sequential(nn.Linear(32, 70, bias=False))
    layer[0].weight.data.copy_(weight)
    prepare(layer, Q80())
    monkeypatch.setattr("distill.quantization.fake_quant.LARGE", 320)
    assert torch.equal(layer[0].effective(layer[0].weight), Q80().dequantize(Q80().quantize(weight)))


def test_gptq_leaves_embeddings_and_head_to_their_own_grid(ids: torch.Tensor) -> None:
    model = make("qwen3")
    prepare(model, IntGroup(scale="mse", group_size=16), embeddings=IntGroup(bits=8))
    weight = model.lm_head.weight.detach().clone()
    rounded = gptq(model, [{"input_ids": ids}], lambda batch: model(**batch).logits)
    assert "lm_head" not in rounded
    assert len(rounded) == 7
    assert torch.equal(model.lm_head.weight, weight)


def test_grids_of_shared_weights_agree() -> None:
    model = make("qwen3")
    assert {*ENDS} <= {*prepare(model, IntGroup(skip=()))}
    assert fake_quant_layers(model)["lm_head"].spec == fake_quant_layers(model)["model.embed_tokens"].spec
    both = IntGroup(skip=(), include=("embed_tokens",))
    with pytest.raises(InputError, match=r"shares its weight with .*another grid"):
        prepare(make("qwen3"), both, [("lm_head", Int8Channel())])


def test_an_embedding_that_cannot_be_quantized_is_named() -> None:
    class Odd(nn.Embedding):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return functional.embedding(input, self.weight) * 2

    model = make("llama")
    model.set_input_embeddings(Odd(64, 32))
    with pytest.raises(InputError, match=r"model.embed_tokens \(Odd\) is neither .*; set embeddings: keep"):
        prepare(model, Q40(), embeddings=Q80())
    assert not fake_quant_layers(model)


@pytest.mark.parametrize(
    ("kind", "layers", "width", "expected"),
    [
        (None, Q40(), 64, "Q8_0"),
        (None, IntGroup(), 64, "int8, group 32"),
        (None, Ternary(), None, "Q8_0"),
        (None, IntGroup(), 72, "int8, per channel"),
        (None, IntGroup(bits=5), 64, None),
        (None, Fp8(), 64, None),
        (None, Q80(), 64, None),
        ("keep", Q40(), 64, None),
        ("q6_k", IntGroup(bits=8), 256, "Q6_K"),
        ("int8", Q40(), 72, "int8, per channel"),
    ],
)
def test_the_grid_follows_the_layers_unless_it_is_named(
    kind: Any, layers: Any, width: int | None, expected: str | None
) -> None:
    grid = embeddings_grid(kind, layers, width)
    assert (grid and grid.label()) == expected


@pytest.mark.parametrize(
    "grid", [IntGroup(include=("embed_tokens",)), IntGroup(skip=()), IntGroup(skip=(), include=("embed_tokens",))]
)
def test_patterns_that_choose_an_end_choose_both_uses_of_a_tied_weight(grid: IntGroup) -> None:
    """Their grid goes before the default of embeddings, and gptq leaves a shared weight alone."""
    model = make("qwen3")
    prepare(model, grid, embeddings=embeddings_grid(None, grid))
    layers = fake_quant_layers(model)
    assert [layers[name].spec.label() for name in ENDS] == [grid.label()] * 2
    assert all(layers[name].is_end for name in ENDS)
    codes = convert(model)
    assert torch.equal(codes[ENDS[0]].values, codes[ENDS[1]].values)
