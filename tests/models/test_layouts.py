"""The layouts against the real classes: parameter counts of real, large configs, without a weight in memory."""

import subprocess
import sys

import pytest
import torch
import transformers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import distill
from distill.core.batch import causal_batch
from distill.core.errors import InputError
from distill.forecast import describe
from distill.models.layouts import layout_for
from distill.pruning.plan import plan
from distill.pruning.random import random
from distill.recipe import Recipe

LLAMA_8B = LlamaConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8,
)  # fmt: skip
NEMO_12B = MistralConfig(
    vocab_size=131072, hidden_size=5120, intermediate_size=14336, num_hidden_layers=40, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128,
)  # fmt: skip
QWEN2_05B = Qwen2Config(
    vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
    num_key_value_heads=2, tie_word_embeddings=True,
)  # fmt: skip
QWEN3_06B = Qwen3Config(
    vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
    num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
)  # fmt: skip
SMOLLM2_135M = LlamaConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, tie_word_embeddings=True,
)  # fmt: skip

# Parameters as the model cards count them.
REAL = [
    (LlamaForCausalLM, LLAMA_8B, 8_030_261_248),
    (MistralForCausalLM, NEMO_12B, 12_247_782_400),
    (Qwen2ForCausalLM, QWEN2_05B, 494_032_768),
    (Qwen3ForCausalLM, QWEN3_06B, 596_049_920),
    (LlamaForCausalLM, SMOLLM2_135M, 134_515_008),
]
# Sreenivas et al. 2024, arXiv 2408.11796, and what small tied models can take.
RECIPES = [
    (LlamaForCausalLM, LLAMA_8B, {"hidden_size": 3072, "intermediate_size": 9216}),
    (LlamaForCausalLM, LLAMA_8B, {"num_hidden_layers": 16, "layer_choice": "contiguous"}),
    (MistralForCausalLM, NEMO_12B, {"hidden_size": 4096, "intermediate_size": 11520}),
    (Qwen2ForCausalLM, QWEN2_05B, {"hidden_size": 768, "num_key_value_heads": 1}),
    (Qwen3ForCausalLM, QWEN3_06B, {"hidden_size": 768, "num_attention_heads": 8}),
    (LlamaForCausalLM, SMOLLM2_135M, {"hidden_size": 432, "num_attention_heads": 6}),
]


def meta_count(build, config):
    with torch.device("meta"):
        return sum(p.numel() for p in build(config).parameters())


@pytest.mark.parametrize(("build", "config", "expected"), REAL)
def test_count_of_real_models(build, config, expected):
    assert layout_for(config.model_type).count(config.to_dict()) == expected == meta_count(build, config)


@pytest.mark.parametrize(("build", "config", "keep"), RECIPES)
def test_real_recipes_plan_and_build(build, config, keep):
    layout = layout_for(config.model_type)
    scores = random(layout.sizes(config.to_dict()), 0)
    made = plan(scores, keep, layout, config.to_dict())
    smaller = type(config).from_dict({**config.to_dict(), **made.config})
    assert meta_count(build, smaller) == made.parameters < made.parameters_before
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if "hidden_size" in keep:
        assert smaller.head_dim == head_dim
        old, new = config.rms_norm_eps, smaller.rms_norm_eps
        assert new == pytest.approx(old * config.hidden_size / smaller.hidden_size, rel=1e-12)


def test_minitron_width_is_the_published_size():
    """Llama-3.1-Minitron-4B-Width has 4.51e9 parameters."""
    layout = layout_for("llama")
    scores = random(layout.sizes(LLAMA_8B.to_dict()), 0)
    made = plan(scores, {"hidden_size": 3072, "intermediate_size": 9216}, layout, LLAMA_8B.to_dict())
    assert made.parameters == 4_512_746_496
    assert made.summary() == [
        "MLP neurons 14336 -> 9216 in each of 32 layers",
        "hidden channels 4096 -> 3072",
        "parameters 8,030,261,248 -> 4,512,746,496 (56.2%)",
    ]


def test_unknown_architecture_is_refused_by_name():
    with pytest.raises(InputError, match=r"model_type 'lama' .*llama, mistral, qwen2.*mean 'llama'"):
        layout_for("lama")
    with pytest.raises(InputError, match=r"model_type 'opt' .*; add its layout to distill/models/layouts"):
        layout_for("opt")


def test_an_architecture_that_cannot_be_cut_is_refused_before_anything_is_loaded(tmp_path):
    OPTConfig(**OPT).save_pretrained(tmp_path / "teacher")  # no weights, no tokenizer: reading them would fail
    recipe = {
        "name": "x", "teacher": str(tmp_path / "teacher"),
        "data": {"train": {"kind": "jsonl", "path": str(tmp_path / "none.jsonl")}, "sequence_length": 16},
        "stages": {"prune": {"keep": {"num_hidden_layers": 1}}},
    }  # fmt: skip
    with pytest.raises(InputError, match=r"prune: .*model_type 'opt' .*; add its layout"):
        describe(Recipe.model_validate(recipe))


OPT = {
    "vocab_size": 64, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4,
}  # fmt: skip
SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip


def test_what_cannot_be_cut_yet_says_why_and_can_be_distilled_and_quantized():
    for model_type in ("qwen3_5_text", "lfm2", "granitemoehybrid", "nemotron_h", "gemma4_text", "gpt_oss"):
        with pytest.raises(InputError, match=rf"'{model_type}' cannot be pruned yet, because .*; it can be distilled"):
            layout_for(model_type)
    keys = {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}
    config = transformers.Lfm2Config(**SMALL, **keys)
    torch.manual_seed(0)
    teacher, student = (transformers.Lfm2ForCausalLM(config) for _ in range(2))
    mask = torch.ones(1, 8, dtype=torch.bool)
    mask[:, -1] = False
    batch = causal_batch(torch.arange(8)[None], mask)
    module = distill.DistillationModule(student, ["forward_kl"], teacher)
    total, _ = module.batch_losses(batch, module.losses)
    total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())
    grid = {"kind": "int_group", "group_size": 32, "skip": ["lm_head", "conv"]}
    rows = distill.evaluate({"teacher": teacher, "int4": distill.quantize(teacher, grid)}, [batch])
    assert 0 < rows.of("int4").kl_to_teacher < 0.5


def test_sizes_may_be_derived_or_wrong():
    layout = layout_for("llama")
    raw = {
        "model_type": "llama", "vocab_size": 10, "hidden_size": 64, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }  # fmt: skip
    assert layout.sizes(raw) | {"head_dim": 16, "kv_groups": 4} == layout.sizes(raw)
    with pytest.raises(InputError, match="intermediate_size is None"):
        layout.sizes({**raw, "intermediate_size": None})
    with pytest.raises(InputError, match="4 attention heads for 3 KV groups"):
        layout.sizes({**raw, "num_key_value_heads": 3})
    with pytest.raises(InputError, match="model_type is 'bert', expected 'llama'"):
        layout.sizes({**raw, "model_type": "bert"})


def test_import_needs_no_torch():
    code = (
        "import sys, distill.models.layouts, distill.pruning, distill.pruning.plan;"
        "sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
