"""Left-out layers against models that really lack them."""

import copy

import pytest
import torch
import torch.nn.functional as F

from distill.core.errors import InputError
from distill.pruning import LeaveOneOut
from distill.pruning.base import Scores
from distill.pruning.keep import KeepSpec
from distill.pruning.plan import plan


@pytest.fixture(scope="module")
def exact(model):
    return copy.deepcopy(model).double()


@torch.no_grad()
def without(model, gone, batches):
    """Logits of the tokens that count, and their targets, of a model whose layers ``gone`` are taken out."""
    short = copy.deepcopy(model)
    short.model.layers = torch.nn.ModuleList(layer for i, layer in enumerate(short.model.layers) if i not in gone)
    short.config.num_hidden_layers = len(short.model.layers)
    logits = torch.cat([short(b["input_ids"], use_cache=False).logits[b["mask"]] for b in batches])
    return logits, torch.cat([b["input_ids"].roll(-1, 1)[b["mask"]] for b in batches])


@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("loss", ["cross_entropy", "kl"])
def test_equals_models_that_lack_the_layers(exact, layout, batches, loss, length):
    scores = LeaveOneOut(loss=loss, block_layers=length).score(exact, layout, batches)
    got = scores.layers if length == 1 else scores.layer_blocks
    assert len(scores.tensors()) == 1
    assert got.shape == (3 - length + 1,)
    whole, targets = without(exact, (), batches)
    for start, value in enumerate(got.tolist()):
        logits, _ = without(exact, range(start, start + length), batches)
        if loss == "kl":
            expected = F.kl_div(logits.log_softmax(-1), whole.log_softmax(-1), log_target=True, reduction="sum")
            expected = expected / len(targets)
        else:
            expected = F.cross_entropy(logits, targets) - F.cross_entropy(whole, targets)
        assert value == pytest.approx(expected.item(), rel=1e-4)


def test_what_stands_before_is_not_computed_again(exact, layout, batches):
    runs = [0, 0, 0]
    for index, layer in enumerate(exact.model.layers):
        mlp = layer.mlp
        mlp.register_forward_hook(lambda *_, index=index: runs.__setitem__(index, runs[index] + 1))
    LeaveOneOut().score(exact, layout, batches[:1])
    for layer in exact.model.layers:
        layer.mlp._forward_hooks.clear()
    assert runs == [1, 2, 3]  # once in the whole model, then only for the layers left out before them


def test_a_contiguous_cut_measures_its_own_block():
    keep = KeepSpec(num_hidden_layers=5, layer_choice="contiguous")
    assert LeaveOneOut().resolved_for(keep, 8).block_layers == 3
    assert LeaveOneOut().resolved_for(KeepSpec(num_hidden_layers=5), 8).block_layers == 1
    with pytest.raises(InputError, match=r"block_layers \(2\) must equal the number of .*\(3\)"):
        LeaveOneOut(block_layers=2).resolved_for(keep, 8)
    with pytest.raises(InputError, match="must be less than the number of layers \\(3\\)"):
        LeaveOneOut(block_layers=3)._length(3)


def test_the_plan_drops_the_block_that_costs_least(layout, model):
    config = {**model.config.to_dict(), "num_hidden_layers": 6}
    keep = {"num_hidden_layers": 4, "layer_choice": "contiguous"}
    blocks = torch.tensor([0.0, 3.0, 1.0, 2.0, 0.0])  # the first and the last would take an end of the model along
    assert plan(Scores(layer_blocks=blocks), keep, layout, config).layers == (0, 1, 4, 5)
    with pytest.raises(InputError, match="layer_blocks"):
        plan(Scores(layer_blocks=blocks[:3]), keep, layout, config)
