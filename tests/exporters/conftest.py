from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from distill.core.artifact import Lineage, write_lineage
from distill.core.batch import causal_batch
from distill.evaluation.engine import Engine
from distill.exporters.compressed_tensors import save
from distill.quantization import IntGroup
from distill.quantization.convert import round_unquantized
from distill.quantization.prepare import prepare

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}


@pytest.fixture
def make() -> Callable[[str], PreTrainedModel]:
    """Tiny models with weights wide enough for rounding to show: llama (untied), qwen3 (tied head), qwen3_bias."""

    def build(name: str) -> PreTrainedModel:
        torch.manual_seed(0)
        if name == "llama":
            model: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**SIZES))
        else:
            bias = name == "qwen3_bias"
            config = Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True, attention_bias=bias)
            model = Qwen3ForCausalLM(config)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "norm" in key or "bias" in key:
                    parameter.add_(torch.randn_like(parameter), alpha=0.3)
        return model.eval()

    return build


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1")


@pytest.fixture
def batches() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, -1] = False
    return [causal_batch(ids, mask)]


@pytest.fixture
def trained(make: Callable[[str], PreTrainedModel]) -> PreTrainedModel:
    """A tied model that was trained under int4, rounded as it will be stored."""
    model = make("qwen3")
    prepare(model, IntGroup())
    round_unquantized(model, torch.bfloat16)
    return model


@pytest.fixture
def artifact(tmp_path: Path, trained: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Path:
    """What a quantize stage leaves of it."""
    folder = tmp_path / "artifact"
    save(trained, folder, tokenizer)
    write_lineage(
        folder,
        Lineage(
            stage="small",
            kind="quantize",
            parent="/home/someone/pruned",
            teacher="teacher",
            base_model="some-team/Base-1B",
            licence="apache-2.0",
            input_hash="0123456789abcdef",
        ),
    )
    return folder


@pytest.fixture
def agrees() -> Callable[..., None]:
    """Compares an engine for measurements with the model: whole texts, and several going on token by token."""

    def compare(engine: Engine, model: PreTrainedModel, tolerance: float) -> None:
        ids = torch.randint(0, 64, (3, 14), generator=torch.Generator().manual_seed(5))
        with torch.no_grad():
            expected = model(input_ids=ids).logits
        assert engine.vocabulary == expected.shape[-1]
        for first in (0, 5):
            found = torch.cat([torch.from_numpy(piece) for piece in engine.logits(ids[1].tolist(), first)])
            assert (found - expected[1, first:]).abs().max() < tolerance
        engine.reserve(3, 14)
        read = engine.prefill(ids[:, :10].numpy())
        assert (torch.from_numpy(read) - expected[:, 9]).abs().max() < tolerance
        for place in range(10, 14) if engine.decodes else []:
            made = engine.step(ids[:, place].numpy())
            assert (torch.from_numpy(made) - expected[:, place]).abs().max() < tolerance
        again = engine.prefill(ids[:, :10].numpy())
        assert numpy.array_equal(read, again), "nothing of the first time is left"

    return compare
