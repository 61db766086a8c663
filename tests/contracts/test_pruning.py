"""Every architecture and every criterion through the same tests, on tiny random models of the real classes."""

import copy
import dataclasses
import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from distill.core.errors import InputError
from distill.models.layouts import LAYOUTS, layout_for
from distill.pruning import CRITERIA
from distill.pruning.base import Scores
from distill.pruning.layout import AXES
from distill.pruning.plan import Plan, plan
from distill.pruning.random import random
from distill.pruning.surgery import apply

# A large epsilon, so that a norm that is rescaled wrongly shows.
SHAPE = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-2,
    "initializer_range": 0.2,
    "eos_token_id": None,
}
SLIDING = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": LLAMA3_ROPE, "head_dim": 8}),
    "llama_tied": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "llama_biases": (LlamaForCausalLM, LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "mistral": (MistralForCausalLM, MistralConfig, {"head_dim": 8, "sliding_window": 5}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, SLIDING),
    "qwen2_tied": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 8, **SLIDING}),
    "qwen3_tied_biases": (Qwen3ForCausalLM, Qwen3Config, {"tie_word_embeddings": True, "attention_bias": True}),
}
CUTS = {
    "mlp": {"intermediate_size": 20},
    "heads": {"num_attention_heads": 2},
    "kv_groups": {"num_key_value_heads": 1},
    "hidden": {"hidden_size": 40},
    "layers": {"layers": (0, 2, 3)},
    "all": {
        "hidden_size": 48,
        "intermediate_size": 32,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "layers": [1, 3],
    },
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    build, config, extra = MODELS[request.param]
    torch.manual_seed(0)
    made = build(config(**SHAPE, **extra)).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.ndim == 1:  # norms and biases start at ones and zeros, which hide mistakes
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
            assert parameter.isfinite().all(), name
    return made


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 101, (3, 12), generator=torch.Generator().manual_seed(1))


def cut(model, keep, seed=3):
    layout = layout_for(model.config.model_type)
    scores = random(layout.sizes(model.config.to_dict()), seed)
    made = plan(scores, keep, layout, model.config.to_dict())
    return apply(model, made, layout), made


def masked(model, made):
    """The unpruned model with everything that the plan removes silenced, written down without the layout."""
    silent = copy.deepcopy(model)
    head_dim = made.before["head_dim"]

    def gone(kept, total):
        return [i for i in range(total) if i not in kept]

    hidden = gone(made.hidden_channels, made.before["hidden_channels"])
    with torch.no_grad():
        silent.model.embed_tokens.weight[:, hidden] = 0
        for new, old in enumerate(made.layers):
            layer = silent.model.layers[old]
            layer.mlp.down_proj.weight[:, gone(made.mlp_neurons[new], made.before["mlp_neurons"])] = 0
            for head in gone(made.attention_heads[new], made.before["attention_heads"]):
                layer.self_attn.o_proj.weight[:, head * head_dim : (head + 1) * head_dim] = 0
        for layer in silent.model.layers:
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight[hidden] = 0
                if linear.bias is not None:
                    linear.bias[hidden] = 0
        for index, layer in enumerate(silent.model.layers):
            if index not in made.layers:
                for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                    linear.weight.zero_()
                    if linear.bias is not None:
                        linear.bias.zero_()
    return silent


def test_keeping_everything_is_the_identity(model, ids):
    everything = {"hidden_size": 64, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 4}
    pruned, made = cut(model, everything)
    assert made.config == {}
    assert not pruned.training
    assert pruned.config.to_dict() == {**model.config.to_dict(), "dtype": "float32"}
    before, after = model.state_dict(), pruned.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(model(ids).logits, pruned(ids).logits)
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(model.parameters(), pruned.parameters(), strict=True))


@pytest.mark.parametrize("keep", CUTS.values(), ids=CUTS)
def test_pruned_equals_masked(model, ids, keep):
    before = copy.deepcopy(model.state_dict())
    pruned, made = cut(model, keep)
    expected = masked(model, made)(ids).logits
    torch.testing.assert_close(pruned(ids).logits, expected, rtol=0, atol=2e-5 * expected.abs().max().item())
    assert (expected - model(ids).logits).abs().max() > 1e-2  # the cut is felt
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("keep", CUTS.values(), ids=CUTS)
def test_forecast_is_the_truth_and_the_plan_a_round_trip(model, keep):
    pruned, made = cut(model, keep)
    assert made.parameters == sum(p.numel() for p in pruned.parameters())
    assert made.parameters_before == sum(p.numel() for p in model.parameters())
    assert made.parameters < made.parameters_before
    assert Plan.from_dict(json.loads(json.dumps(made.to_dict()))) == made


def test_vanilla_transformers_loads_and_generates(model, ids, tmp_path):
    model.generation_config.pad_token_id = 7
    pruned, _ = cut(model, CUTS["all"])
    assert pruned.generation_config.pad_token_id == 7
    pruned.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert torch.equal(loaded(ids).logits, pruned(ids).logits)
    tied = model.config.tie_word_embeddings
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert (pruned.lm_head.weight is pruned.model.embed_tokens.weight) == tied
    assert [layer.self_attn.layer_idx for layer in pruned.model.layers] == [0, 1]
    for one in (pruned, loaded):
        cached, uncached = (
            one.generate(ids, max_new_tokens=10, do_sample=False, use_cache=cache) for cache in (True, False)
        )
        assert cached.shape == (3, 22)
        assert torch.equal(cached, uncached)


def test_backward_reaches_every_parameter(model, ids):
    pruned, _ = cut(model, CUTS["all"])
    pruned.train()
    pruned(ids, labels=ids).loss.backward()
    for name, parameter in pruned.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert all(parameter.grad is None for parameter in model.parameters())


def test_dtype_mode_and_attention_implementation_carry_over(model):
    half = copy.deepcopy(model).to(torch.bfloat16).train()
    half.set_attn_implementation("eager")
    pruned, _ = cut(half, CUTS["all"])
    assert {p.dtype for p in pruned.parameters()} == {torch.bfloat16}
    assert pruned.training
    assert pruned.config._attn_implementation == "eager"


def test_per_layer_lists_follow_the_layers(model):
    pruned, made = cut(model, {"layers": (1, 3)})
    old = getattr(model.config, "layer_types", None)
    assert (old is None) == (model.config.model_type in ("llama", "mistral"))
    if old is not None:
        assert pruned.config.layer_types == [old[1], old[3]] == made.config["layer_types"]


@pytest.mark.parametrize(("kind", "criterion"), CRITERIA.items())
def test_criterion_scores_its_axes_and_leaves_the_model_alone(kind, criterion, model, ids):
    layout = layout_for(model.config.model_type)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, -1] = False
    batches = [{"input_ids": ids, "mask": mask}]
    before = copy.deepcopy(model.state_dict())
    model.train()
    first, again = (criterion().score(model, layout, batches) for _ in range(2))
    assert model.training
    model.eval()
    assert criterion.model_fields["kind"].default == kind
    assert set(first.tensors()) == set(criterion.axes) <= set(AXES)
    sizes = layout.sizes(model.config.to_dict())
    for axis, tensor in first.tensors().items():
        rows = () if axis in ("hidden_channels", "layers") else (sizes["layers"],)
        assert tensor.shape == (*rows, sizes[axis])
        assert tensor.dtype == torch.float32
        assert tensor.device.type == "cpu"
        assert torch.equal(tensor, again.tensors()[axis])
        assert tensor.unique().numel() > 1
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert Scores(**first.tensors()).tensors().keys() == first.tensors().keys()


def test_a_forgotten_parameter_is_refused(model):
    layout = layout_for(model.config.model_type)
    made = plan(Scores(), {}, layout, model.config.to_dict())
    short = dataclasses.replace(layout, parameters=tuple(p for p in layout.parameters if p.path != "model.norm.weight"))
    with pytest.raises(InputError, match=r"model\.norm\.weight is \(64,\), expected no such parameter"):
        apply(model, made, short)


def test_every_layout_is_tried():
    assert {config.model_type for _, config, _ in MODELS.values()} == set(LAYOUTS)


def test_epsilon_matters_in_these_tests(ids):
    """A test of the tests: with epsilon or the weight left as it was, pruned != masked would be seen."""
    torch.manual_seed(0)
    small = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    pruned, made = cut(small, CUTS["hidden"])
    expected = masked(small, made)(ids).logits
    for layer in pruned.model.layers:
        layer.input_layernorm.variance_epsilon *= 40 / 64
    error = (pruned(ids).logits - expected).abs().max()
    assert error > 1e-3 * expected.abs().max()
