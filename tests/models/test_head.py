"""Body + head is the model's own forward, for architectures that scale, cap or tie their logits, and refused if not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from distill.core.errors import InputError
from distill.losses import ForwardKL
from distill.losses.head_losses import Signal, head_losses
from distill.models.head import check_head, hidden_states, output_head

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0},
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0},
    "granite": {"logits_scaling": 8.0, "residual_multiplier": 0.2, "embedding_multiplier": 12.0},
    "cohere": {"logit_scale": 0.0625},
    "cohere2": {"logit_scale": 0.25},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2},
    "olmo2": {},
    "phi3": {"pad_token_id": 0},
    "gpt_neox": {},
}
EACH = pytest.mark.parametrize("kind", ARCHITECTURES)


def make(kind: str) -> PreTrainedModel:
    """Two layers, with weights so wide that a forgotten cap or scale shows."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind != "gpt_neox":
        sizes["num_key_value_heads"] = 2
    if kind == "gpt2":
        sizes = {}
    special = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    config = AutoConfig.for_model(
        kind, **{"vocab_size": 40, "initializer_range": 0.5, **special, **sizes, **ARCHITECTURES[kind]}
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


@EACH
def test_body_and_head_are_the_model(kind: str) -> None:
    model = make(kind).eval()
    check_head(model)
    ids = torch.randint(0, 40, (2, 7), generator=torch.Generator().manual_seed(1))
    hidden = hidden_states(model, ids)
    assert hidden.shape == (2, 7, 32)
    theirs = model(input_ids=ids).logits
    assert theirs.std() > 0.1
    torch.testing.assert_close(
        output_head(model).logits(hidden.flatten(0, 1)).view_as(theirs), theirs, rtol=1e-5, atol=1e-5
    )


@EACH
def test_chunks_train_what_the_models_own_logits_train(kind: str) -> None:
    """Caps, scales and ties are in the gradient too, of the body and of the head's own weights."""
    model, teacher = make(kind).eval(), make(kind).eval()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(0.9)
    random = torch.Generator().manual_seed(1)
    ids, mask = torch.randint(0, 40, (2, 7), generator=random), torch.rand(2, 7, generator=random) < 0.7
    targets, loss = ids.roll(-1, 1), ForwardKL(temperature=2.0)
    with torch.no_grad():
        signal, theirs = Signal(hidden_states(teacher, ids), output_head(teacher)), teacher(input_ids=ids).logits
    expected = loss(model(input_ids=ids).logits, theirs, targets, mask).sum
    named = dict(model.named_parameters())
    gradients = torch.autograd.grad(expected, list(named.values()))
    total, _ = head_losses(
        hidden_states(model, ids), output_head(model), signal, targets, mask, [(loss.kind, loss)], chunk_tokens=3
    )
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-5)
    ours = torch.autograd.grad(total, list(named.values()))
    for name, got, wanted in zip(named, ours, gradients, strict=True):
        assert (got - wanted).norm() <= 1e-4 * wanted.norm() + 1e-5, name
    assert output_head(model).parameters
    assert any(gradient.any() for gradient in ours)


@pytest.mark.parametrize(
    ("kind", "key", "off"),
    [
        ("gemma2", "final_logit_softcapping", None),
        ("gemma3_text", "final_logit_softcapping", None),
        ("granite", "logits_scaling", 1.0),
        ("cohere", "logit_scale", 1.0),
    ],
)
def test_a_forgotten_scale_would_be_noticed(kind: str, key: str, off: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(kind)
    forward, value = model.forward, getattr(model.config, key)

    def with_scale(**settings: Any) -> Any:
        setattr(model.config, key, value)
        try:
            return forward(**settings)
        finally:
            setattr(model.config, key, off)

    check_head(model)
    setattr(model.config, key, off)  # what our head sees
    monkeypatch.setattr(model, "forward", with_scale)
    with pytest.raises(InputError, match="does not support"):
        check_head(model)


def test_another_architecture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama")
    forward = model.forward

    def with_a_multiplier_of_its_own(**settings: Any) -> Any:
        out = forward(**settings)
        out.logits = out.logits * 1.01
        return out

    monkeypatch.setattr(model, "forward", with_a_multiplier_of_its_own)
    with pytest.raises(
        InputError, match=r"^LlamaForCausalLM has an operation between .* use a model of another architecture$"
    ):
        check_head(model)


@pytest.mark.parametrize("training", [True, False])
def test_checking_leaves_the_model_as_it_was(training: bool) -> None:
    model = make("gpt2").train(training)  # has dropout
    before = torch.get_rng_state()
    check_head(model)
    assert model.training == training
    assert all(part.training == training for part in model.modules())
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in model.parameters())


def test_nan_weights_are_refused() -> None:
    model = make("llama")
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    with pytest.raises(InputError):
        check_head(model)


def test_a_model_without_head_is_refused() -> None:
    with pytest.raises(InputError, match="LlamaModel has no output head"):
        output_head(make("llama").model)


def test_the_head_names_its_parameters() -> None:
    model = make("gpt2")
    (weight,) = output_head(model).parameters
    assert weight is model.lm_head.weight is model.transformer.wte.weight
