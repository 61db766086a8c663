"""Reconstruction against least squares in float64, and what it must make good exactly."""

import copy
import dataclasses

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from distill.core.batch import causal_batch
from distill.core.errors import InputError
from distill.models.layouts import layout_for
from distill.pruning.plan import plan
from distill.pruning.random import random
from distill.pruning.reconstruct import reconstruct
from distill.pruning.surgery import apply


def cut(model, layout, keep, vocabulary=None):
    config = model.config.to_dict()
    made = plan(random(layout.sizes(config), 0), keep, layout, config, vocabulary)
    return apply(model, made, layout), made


def passing(model, path, batch):
    """What enters and leaves a module, for the tokens that count."""
    seen = []
    handle = model.get_submodule(path).register_forward_hook(lambda _m, args, out: seen.append((args[0], out)))
    with torch.no_grad():
        model(input_ids=batch["input_ids"])
    handle.remove()
    return [tensor[batch["mask"]].double() for tensor in seen[0]]


@pytest.fixture
def text():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 53, (12, 16), generator=generator)
    return [causal_batch(part, torch.ones_like(part, dtype=torch.bool)) for part in ids.split(5)]


def test_the_first_projection_is_the_ridge_solution(model, layout, text):
    pruned, made = cut(model, layout, {"num_attention_heads": 2, "hidden_size": 24})
    before = copy.deepcopy(pruned)
    whole_batch = {key: torch.cat([batch[key] for batch in text]) for key in text[0]}
    x, _ = passing(before, "model.layers.0.self_attn.o_proj", whole_batch)
    _, y = passing(model, "model.layers.0.self_attn.o_proj", whole_batch)
    y = y[:, list(made.hidden_channels)]
    old = before.model.layers[0].self_attn.o_proj.weight.detach().double()
    pull = (0.05 * x.square().sum() / x.shape[1]).sqrt()
    rows, wanted = torch.cat([x, pull * torch.eye(x.shape[1])]), torch.cat([y, pull * old.T])
    reference = torch.linalg.lstsq(rows, wanted).solution.T
    reconstruct(pruned, model, made, layout, text, ridge=0.05)
    torch.testing.assert_close(pruned.model.layers[0].self_attn.o_proj.weight.double(), reference, rtol=1e-4, atol=1e-5)


def test_a_bias_takes_what_the_means_leave(text):
    """GPT-2's projections have one, and lie transposed; tokens that do not count stand between those that do."""
    layout, holes = layout_for("gpt2"), torch.Generator().manual_seed(9)
    torch.manual_seed(0)
    whole = GPT2LMHeadModel(GPT2Config(vocab_size=53, n_embd=32, n_layer=1, n_head=4, initializer_range=0.3)).eval()
    for parameter in whole.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    text = [{**batch, "mask": torch.rand(batch["mask"].shape, generator=holes) < 0.6} for batch in text]
    pruned, made = cut(whole, layout, {"intermediate_size": 40})
    rows = {key: torch.cat([batch[key] for batch in text]) for key in text[0]}
    down = "transformer.h.0.mlp.c_proj"
    old = copy.deepcopy(pruned.get_submodule(down))
    reconstruct(pruned, whole, made, layout, text, ridge=0.05)
    x, _ = passing(pruned, down, rows)  # what is below it has been solved before
    _, y = passing(whole, down, rows)
    x, y = (torch.cat([tensor, torch.ones(len(tensor), 1)], 1) if tensor is x else tensor for tensor in (x, y))
    centred = x[:, :-1] - x[:, :-1].mean(0)
    pull = (0.05 * centred.square().sum() / centred.shape[1]).sqrt()
    damped = torch.cat([x, torch.cat([pull * torch.eye(centred.shape[1]), torch.zeros(centred.shape[1], 1)], 1)])
    solution = torch.linalg.lstsq(damped, torch.cat([y, pull * old.weight.detach().double()])).solution
    torch.testing.assert_close(pruned.get_submodule(down).weight.double(), solution[:-1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pruned.get_submodule(down).bias.double(), solution[-1], rtol=1e-4, atol=1e-5)


def test_a_neuron_that_another_one_equals_is_made_good(model, layout, text):
    """Dropping one of two equal neurons loses nothing that its twin could not put out."""
    twins = copy.deepcopy(model)
    for layer in twins.model.layers:
        for name in ("gate_proj", "up_proj"):
            weight = layer.mlp.get_submodule(name).weight.data
            weight[12:] = weight[:12]
    config = twins.config.to_dict()
    scores = random(layout.sizes(config), 0)
    scores = dataclasses.replace(scores, mlp_neurons=torch.arange(24.0).flip(0).expand(3, -1))
    made = plan(scores, {"intermediate_size": 12}, layout, config)
    pruned = apply(twins, made, layout)
    before, after = reconstruct(pruned, twins, made, layout, text, ridge=1e-9)
    assert before > 0.01
    assert after < 1e-6
    with torch.no_grad():
        torch.testing.assert_close(
            pruned(text[0]["input_ids"]).logits, twins(text[0]["input_ids"]).logits, atol=1e-3, rtol=0
        )


def test_tokens_that_do_not_count_change_nothing(model, layout, batches):
    made_of = []
    for fill in (0, 7):
        pruned, made = cut(model, layout, {"intermediate_size": 12})
        given = [{**batch, "input_ids": batch["input_ids"].masked_fill(~batch["mask"], fill)} for batch in batches]
        # Causal attention: only positions after the last that counts can be changed without changing what is read.
        last = [batch["mask"].nonzero()[:, 1].max() for batch in batches]
        given = [
            causal_batch(torch.where(torch.arange(9) > end, g["input_ids"], b["input_ids"]), b["mask"])
            for b, g, end in zip(batches, given, last, strict=True)
        ]
        reconstruct(pruned, model, made, layout, given, ridge=0.01)
        made_of.append(pruned.state_dict())
    assert all(torch.equal(made_of[0][name], made_of[1][name]) for name in made_of[0])


def test_the_whole_model_is_its_own_reconstruction(model, layout, text):
    pruned, made = cut(model, layout, {"intermediate_size": 24})
    before, after = reconstruct(pruned, model, made, layout, text, ridge=0.01)
    assert before == pytest.approx(0, abs=1e-6)
    assert after == pytest.approx(0, abs=1e-6)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(pruned.state_dict()[name], weight, atol=1e-5, rtol=1e-4)


def test_a_cut_vocabulary_is_refused(model, layout, text):
    pruned, made = cut(model, layout, {"intermediate_size": 12}, vocabulary=range(20))
    with pytest.raises(InputError, match="cut the vocabulary in another prune stage"):
        reconstruct(pruned, model, made, layout, text, ridge=0.01)
