"""Taylor scores against finite differences: the derivative of each sample's loss to a gate that is really there."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F

from distill.pruning import Taylor

STEP = 1e-5


@pytest.fixture(scope="module")
def exact(model):
    """In fp64 throughout: the norms of transformers compute in fp32, which differences cannot bear."""
    made = copy.deepcopy(model)
    for name, norm in list(made.named_modules()):
        if name.endswith("norm"):
            made.set_submodule(name, torch.nn.RMSNorm(norm.weight.shape, eps=norm.variance_epsilon))
            made.get_submodule(name).weight.data.copy_(norm.weight)
    return made.double()


@torch.no_grad()
def differences(model, batches, gates):
    """sum over samples of |dL/dgate| by central differences; ``gates`` is a function that puts a gate's value in."""
    samples = [(b["input_ids"][i : i + 1], b["mask"][i]) for b in batches for i in range(len(b["mask"]))]
    total = 0.0
    for ids, mask in samples:
        losses = []
        for value in (1 + STEP, 1 - STEP):
            handles = gates(value)
            logits = model(ids).logits[0]
            losses.append(F.cross_entropy(logits[mask], ids[0].roll(-1)[mask], reduction="sum") if mask.any() else 0.0)
            for handle in handles:
                handle.remove()
        total += abs(float(losses[0] - losses[1]) / (2 * STEP))
    return total / sum(int(b["mask"].sum()) for b in batches)


def gate_inputs(modules, channels):
    def gates(value):
        def hook(_module, args, kwargs):
            given = (args[0] if args else kwargs["hidden_states"]).clone()
            given[..., channels] *= value
            return ((given, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": given})

        return [module.register_forward_pre_hook(hook, with_kwargs=True) for module in modules]

    return gates


def test_equals_finite_differences(exact, layout, batches):
    scores = Taylor().score(exact, layout, batches)
    layers = exact.model.layers
    attention, mlp = layers[1].self_attn, layers[1].mlp

    def check(score, gates):
        assert score.item() == pytest.approx(differences(exact, batches, gates), rel=1e-4)

    for j in (0, 17):
        check(scores.mlp_neurons[1, j], gate_inputs([mlp.down_proj], [j]))
    for head in (0, 3):
        channels = list(range(8 * head, 8 * head + 8))
        check(scores.attention_heads[1, head], gate_inputs([attention.o_proj], channels))
    check(scores.kv_groups[1, 1], gate_inputs([attention.o_proj], list(range(16, 32))))
    reads = [module for layer in layers for module in (layer.self_attn, layer.mlp)]
    check(scores.hidden_channels[5], gate_inputs(reads, [5]))

    def layer_gate(value):
        def hook(_module, args, output):
            return args[0] + value * (output - args[0])

        return [layers[2].register_forward_hook(hook)]

    check(scores.layers[2], layer_gate)


def test_a_batch_is_gone_before_the_next_one(model, layout, batches):
    seen = []
    handle = model.model.layers[0].mlp.down_proj.register_forward_pre_hook(
        lambda _module, args: seen.append(weakref.ref(args[0]))
    )
    gc.disable()  # what only the collector finds may be many batches' graphs by then
    try:
        Taylor().score(model, layout, batches)
    finally:
        gc.enable()
        handle.remove()
    assert seen
    assert not any(reference() is not None for reference in seen)
