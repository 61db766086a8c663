"""Every criterion through the same tests: what it may depend on, and what must not matter."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from distill.core.batch import causal_batch
from distill.core.errors import InputError
from distill.models.layouts import layout_for
from distill.pruning import CRITERIA, Activation, LeaveOneOut
from distill.pruning.base import Scores, collect_statistics, score
from distill.pruning.layout import AXES

from .architectures import MODELS, make

SHAPE = {
    "vocab_size": 47,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
VARIANTS = {
    **{kind: member() for kind, member in CRITERIA.items()},
    "activation_l2": Activation(sequence="l2", batch="mean"),
    "activation_variance": Activation(sequence="variance", batch="variance"),
    "leave_one_out_kl": LeaveOneOut(loss="kl"),
    "leave_two_out": LeaveOneOut(block_layers=2),
}
READS_NO_DATA = {"magnitude", "random"}
each = pytest.mark.parametrize("name", VARIANTS)
each_that_reads = pytest.mark.parametrize("name", [name for name in VARIANTS if name not in READS_NO_DATA])


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def model(request):
    torch.manual_seed(0)
    if request.param == "llama":
        made = LlamaForCausalLM(LlamaConfig(**SHAPE))
    else:
        made = Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=6, tie_word_embeddings=True))
    return made.double().eval()


@pytest.fixture(scope="module")
def rows():
    """Seven samples as a batch: masks with holes, and one sample in which nothing counts."""
    generator = torch.Generator().manual_seed(5)
    mask = torch.rand(7, 9, generator=generator) < 0.7
    mask[:, -1] = False
    mask[3] = False
    return causal_batch(torch.randint(0, 47, (7, 9), generator=generator), mask)


def take(rows, index):
    return {key: value[index] for key, value in rows.items()}


def scored(name, model, batches):
    return VARIANTS[name].score(model, layout_for(model.config.model_type), batches).tensors()


def assert_equal(got, expected, rtol=1e-5):
    assert got.keys() == expected.keys()
    for axis, tensor in expected.items():
        # Beside a layer's largest score the rounding of what cancels is nothing.
        torch.testing.assert_close(got[axis], tensor, rtol=rtol, atol=1e-6 * tensor.abs().max().item())


@each
def test_neither_the_split_into_batches_nor_their_order_matters(name, model, rows):
    expected = scored(name, model, [rows])
    assert_equal(scored(name, model, [take(rows, slice(i, i + 1)) for i in range(7)]), expected)
    assert_equal(scored(name, model, [take(rows, [6, 1, 4]), take(rows, [0, 5, 3, 2])]), expected)


@each
def test_what_does_not_count_does_not_matter(name, model, rows):
    """A padded sample more, and padding after the last token that counts."""
    expected = scored(name, model, [rows])
    ids = torch.cat([rows["input_ids"], torch.full((7, 3), 11)], 1)
    ids = torch.cat([ids, torch.full((1, 12), 13)])
    mask = torch.zeros(8, 12, dtype=torch.bool)
    mask[:7, :9] = rows["mask"]
    got = scored(name, model, [causal_batch(ids, mask, attention_mask=_attended(mask))])
    assert all(tensor.isfinite().all() for tensor in got.values())
    assert_equal(got, expected)


def _attended(mask):
    """As a tokenizer pads: the first nine tokens of the seven samples are text, the eighth is nothing but padding."""
    attended = torch.zeros(mask.shape, dtype=torch.long)
    attended[:7, :9] = 1
    return attended


@each
def test_the_tallies_of_two_ranks_add_up(name, model, rows):
    layout = layout_for(model.config.model_type)
    criterion = VARIANTS[name]
    first, second = (
        collect_statistics([criterion], model, layout, [take(rows, part)])[0] for part in (slice(4), slice(4, 7))
    )
    whole = collect_statistics([criterion], model, layout, [rows])[0]
    for key, value in second.sums.items():
        first.add(key, value)
    assert first.sums.keys() == whole.sums.keys()
    assert all(value.dtype == torch.float64 for value in first.sums.values())
    expected = criterion.compute_scores(model, layout, whole).tensors()
    assert_equal(criterion.compute_scores(model, layout, first).tensors(), expected)


@each_that_reads
def test_the_data_is_read(name, model, rows):
    before = scored(name, model, [take(rows, slice(0, 3))])
    after = scored(name, model, [take(rows, slice(4, 7))])
    assert all(not torch.allclose(before[axis], after[axis], rtol=1e-3) for axis in before)


@each_that_reads
def test_data_in_which_nothing_counts_is_refused(name, model, rows):
    for batches in ([], [take(rows, [3])]):
        with pytest.raises(InputError, match="the masks of the calibration data select 0 tokens"):
            scored(name, model, batches)


@each
def test_the_model_is_left_as_it_was(name, model, rows):
    mine = copy.deepcopy(model).train()
    mine.model.norm.weight.requires_grad_(False)
    before = copy.deepcopy(mine.state_dict())
    scored(name, mine, [rows])
    assert mine.training
    assert [n for n, p in mine.named_parameters() if not p.requires_grad] == ["model.norm.weight"]
    assert all(p.grad is None for p in mine.parameters())
    assert all(torch.equal(before[key], value) for key, value in mine.state_dict().items())
    for module in mine.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in vars(module)


def test_all_who_only_watch_share_one_pass(model, rows):
    names = ["activation", "activation_l2", "fluctuation", "wanda", "weight_range", "block_influence"]
    names += ["magnitude", "random"]
    alone = [scored(name, model, [rows]) for name in names]
    passes = []
    handle = model.model.register_forward_hook(lambda *_: passes.append(1))
    layout = layout_for(model.config.model_type)
    together = score([VARIANTS[name] for name in names], model, layout, [take(rows, slice(3)), take(rows, slice(3, 7))])
    handle.remove()
    assert len(passes) == 2
    for one, expected in zip(together, alone, strict=True):
        assert_equal(one.tensors(), expected)


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("kind", CRITERIA)
def test_every_architecture_is_scored_on_the_axes_that_it_has(kind, architecture):
    """Twice alike, fp32, finite, in the shape that plans expect; the watched model computes what it always does."""
    whole = make(architecture)
    layout, criterion = layout_for(whole.config.model_type), CRITERIA[kind]()
    ids = torch.randint(0, 101, (3, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, -1] = False
    batches = [causal_batch(ids, mask)]
    if layout.task != "causal_lm" and kind in ("taylor", "leave_one_out"):
        with pytest.raises(InputError, match=f"{kind} needs a next-token loss"):
            criterion.score(whole, layout, batches)
        return
    outputs = []
    handle = whole.get_submodule(layout.body).register_forward_hook(lambda *hook: outputs.append(hook[-1][0]))
    first, again = (criterion.score(whole, layout, batches) for _ in range(2))
    whole.eval()(ids)
    handle.remove()
    torch.testing.assert_close(outputs[0], outputs[-1], rtol=1e-4, atol=1e-5)

    sizes = layout.sizes(whole.config.to_dict())
    assert set(criterion.axes) <= set(AXES)
    of_dense = ("fluctuation", "wanda", "weight_range", "taylor")
    unscored = {"mlp_neurons"} if "experts" in sizes and kind in of_dense else set()
    assert set(first.tensors()) == {axis for axis in criterion.axes if axis in sizes} - unscored
    for axis, tensor in first.tensors().items():
        rows = () if axis in ("hidden_channels", "layers") else (sizes["layers"],)
        rows += (sizes["experts"],) if axis == "mlp_neurons" and "experts" in sizes else ()
        assert tensor.shape == (*rows, sizes[axis])
        assert tensor.dtype == torch.float32
        assert tensor.device.type == "cpu"
        assert torch.equal(tensor, again.tensors()[axis])
        assert tensor.unique().numel() > 1
    assert Scores(**first.tensors()).tensors().keys() == first.tensors().keys()
