"""Every criterion through the same tests, on tiny random models of the real classes."""

import copy

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from distill.models.layouts import layout_for
from distill.pruning import CRITERIA
from distill.pruning.base import Scores
from distill.pruning.layout import AXES

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
