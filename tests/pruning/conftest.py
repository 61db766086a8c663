"""A tiny random Llama with a calibration set whose mask has holes."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from distill.core.batch import causal_batch
from distill.models.layouts import layout_for


@pytest.fixture(scope="session")
def layout():
    return layout_for("llama")


@pytest.fixture(scope="session")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=53,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def batches():
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 53, (5, 9), generator=generator)
    mask = torch.rand(5, 9, generator=generator) < 0.6
    mask[:, -1] = False
    mask[3] = False  # a sample in which nothing counts
    return [causal_batch(ids[:2], mask[:2]), causal_batch(ids[2:], mask[2:])]
