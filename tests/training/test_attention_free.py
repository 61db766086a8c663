"""Students without attention, or with little of it, learn from a transformer's logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from distill.core.batch import causal_batch
from distill.core.errors import InputError
from distill.losses import ForwardKL, HiddenMSE
from distill.models.load import new_config, new_model
from distill.training.module import DistillationModule

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
STUDENTS: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 8},
    "mamba2": {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1},
    "rwkv": {"attention_hidden_size": 32, "context_length": 64},
    "falcon_h1": {
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "mamba_d_ssm": 32,
        "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def teacher() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = SIZES | {"intermediate_size": 48, "num_attention_heads": 4, "initializer_range": 0.3}
    return LlamaForCausalLM(LlamaConfig(**sizes))


@pytest.mark.parametrize("kind", STUDENTS)
def test_it_learns_from_logits(kind: str, teacher: LlamaForCausalLM) -> None:
    student = new_model(new_config({"model_type": kind} | SIZES | STUDENTS[kind]), seed=0)
    module = DistillationModule(student, [ForwardKL()], teacher)
    ids = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, -1] = False
    batch, found = causal_batch(ids, mask), []
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    for _ in range(4):
        total, terms = module.batch_losses(batch, module.losses)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        found.append(float(terms["kl"].per_token()))
    assert found[-1] < 0.95 * found[0]
    with pytest.raises(InputError, match="has no layout, which losses on hidden states"):
        DistillationModule(student, [ForwardKL(), HiddenMSE()], teacher)


def test_sizes_that_do_not_fit_each_other_end_in_one_line() -> None:
    config = new_config({"model_type": "recurrent_gemma", "num_attention_heads": 3} | SIZES)
    with pytest.raises(InputError, match="RecurrentGemmaForCausalLM: cannot compute four tokens") as raised:
        DistillationModule(new_model(config, seed=0), [ForwardKL()], new_model(config, seed=1))
    assert "\n" not in str(raised.value)
