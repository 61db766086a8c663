from __future__ import annotations

from typing import Any

import pytest
import torch

from distill.core.errors import InputError
from distill.models.lora import LoraSpec
from distill.quantization import Int8Channel
from distill.quantization.fake_quant import fake_quant_layers
from distill.training.assemble import assemble, disassemble


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.arange(10).reshape(2, 5)


@pytest.mark.parametrize(
    ("way", "trained"), [("full", "all"), ("quant", "all"), ("lora", "adapters"), ("quant lora", "adapters")]
)
def test_what_is_trained(way: str, trained: str, student: Any) -> None:
    made = student(way)
    names = [name for name, p in made.model.named_parameters() if p.requires_grad]
    assert names
    if trained == "all":
        assert len(names) == len(list(made.model.parameters()))
    else:
        assert all("lora_" in name for name in names)
    assert bool(fake_quant_layers(made.model)) == ("quant" in way)
    assert (made.adapted is not None) == ("lora" in way)


def test_a_learned_scale_is_trained_with_the_adapters(student: Any) -> None:
    trained = [name for name, p in student("quant learned lora").model.named_parameters() if p.requires_grad]
    assert {name.rpartition(".")[2] for name in trained if "lora_" not in name} == {"log_scale"}
    assert "log_scale" not in "".join(name for name, _ in student("quant lora").model.named_parameters())


def test_a_frozen_model_is_thawed(llama: Any) -> None:
    model = llama()
    model.requires_grad_(False)
    assert all(p.requires_grad for p in assemble(model).model.parameters())


@pytest.mark.parametrize("way", ["lora", "quant lora", "quant lora head", "quant learned lora"])
def test_disassembling_keeps_what_the_student_computes(way: str, student: Any, ids: torch.Tensor) -> None:
    made = student(way)
    for name, p in made.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    made.model.eval()
    before = made.model(input_ids=ids).logits
    plain = disassemble(made)
    assert not any("lora" in name for name in plain.state_dict())
    assert not plain.training
    after = plain(input_ids=ids).logits
    if "quant" in way and "head" not in way:  # every adapted layer is inside its grid: to the last bit
        assert torch.equal(after, before)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lora", [None, LoraSpec(r=2)])
def test_gradient_checkpointing_changes_no_gradient(lora: Any, llama: Any, ids: torch.Tensor) -> None:
    found = []
    for on in (False, True):
        torch.manual_seed(0)
        made = assemble(llama(), lora=lora, gradient_checkpointing=on)
        for name, p in made.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.ones_(p)
        made.model.train()
        made.model.base_model(input_ids=ids, use_cache=False).last_hidden_state.square().sum().backward()
        found.append({name: p.grad for name, p in made.model.named_parameters() if p.grad is not None})
        disassemble(made)
    assert found[0].keys() == found[1].keys()
    assert len(found[0]) > 5
    for name in found[0]:
        torch.testing.assert_close(found[1][name], found[0][name])


def test_checkpointing_does_recompute(llama: Any, ids: torch.Tensor) -> None:
    made = assemble(llama(), gradient_checkpointing=True)
    made.model.train()
    calls: list[int] = []
    # before, not after: a recomputation ends as soon as it has what the backward pass needs
    made.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    made.model.base_model(input_ids=ids, use_cache=False).last_hidden_state.sum().backward()
    assert len(calls) == 2
    plain = disassemble(made).train()
    calls.clear()
    plain.base_model(input_ids=ids, use_cache=False).last_hidden_state.sum().backward()
    assert len(calls) == 1


def test_dropout_under_fake_quant_is_refused(llama: Any) -> None:
    with pytest.raises(InputError, match="dropout"):
        assemble(llama(), quantizer=Int8Channel(), lora=LoraSpec(dropout=0.1))
