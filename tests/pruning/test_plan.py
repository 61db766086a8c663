"""Plans: what is chosen, and what is refused."""

import pytest
import torch
from pydantic import ValidationError
from transformers import LlamaConfig, MistralConfig

from distill.core.errors import InputError
from distill.models.layouts import layout_for
from distill.pruning.base import Scores
from distill.pruning.keep import KeepSpec
from distill.pruning.plan import plan

CONFIG = LlamaConfig(
    vocab_size=50,
    hidden_size=64,
    intermediate_size=6,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=2,
).to_dict()
LAYOUT = layout_for("llama")


def full_scores():
    generator = torch.Generator().manual_seed(0)
    rows = {"mlp_neurons": 6, "attention_heads": 8, "kv_groups": 2}
    return Scores(
        **{axis: torch.rand(6, size, generator=generator) for axis, size in rows.items()},
        hidden_channels=torch.rand(64, generator=generator),
        layers=torch.tensor([0.0, 0.5, 0.1, 0.9, 0.2, 0.0]),
    )


def made(keep, scores=None):
    return plan(scores or full_scores(), keep, LAYOUT, CONFIG)


def test_the_highest_neurons_of_each_layer_stay_and_ties_go_to_the_first():
    values = torch.tensor([[5.0, 1, 1, 1, 9, 0]] * 5 + [[0.0, 1, 2, 3, 4, 5]])
    result = made({"intermediate_size": 3}, Scores(mlp_neurons=values))
    assert result.mlp_neurons == ((0, 1, 4),) * 5 + ((3, 4, 5),)
    assert result.config == {"intermediate_size": 3}


def test_heads_are_ranked_within_their_group():
    values = torch.tensor([[9.0, 8, 7, 6, 4, 3, 2, 1]] * 6)  # by score alone, group 1 would lose all
    result = made({"num_attention_heads": 4}, Scores(attention_heads=values))
    assert result.attention_heads == ((0, 1, 4, 5),) * 6
    assert result.config == {"num_attention_heads": 4}


def test_a_dropped_group_takes_its_heads():
    groups = torch.tensor([[0.0, 1.0]] * 6)
    result = made({"num_key_value_heads": 1}, Scores(kv_groups=groups))
    assert result.kv_groups == ((1,),) * 6
    assert result.attention_heads == ((4, 5, 6, 7),) * 6
    assert result.config == {"num_key_value_heads": 1, "num_attention_heads": 4}
    heads = torch.tensor([[9.0, 9, 9, 9, 1, 4, 2, 3]] * 6)
    both = made({"num_key_value_heads": 1, "num_attention_heads": 2}, Scores(kv_groups=groups, attention_heads=heads))
    assert both.attention_heads == ((5, 7),) * 6


def test_depth_keeps_the_ends_and_drops_the_lowest():
    result = made({"num_hidden_layers": 4})
    assert result.layers == (0, 1, 3, 5)
    assert result.summary()[0] == "layers 6 -> 4, without 2, 4"
    assert [len(rows) for rows in (result.mlp_neurons, result.attention_heads, result.kv_groups)] == [4, 4, 4]


def test_depth_contiguous_drops_the_cheapest_block():
    # Sums of neighbours: 1-2 0.6, 2-3 1.0, 3-4 1.1.
    assert made({"num_hidden_layers": 4, "layer_choice": "contiguous"}).layers == (0, 3, 4, 5)
    assert made({"num_hidden_layers": 2, "layer_choice": "contiguous"}).layers == (0, 5)


def test_named_layers_may_drop_the_ends_and_need_no_scores():
    result = made({"layers": [1, 2]}, Scores())
    assert result.layers == (1, 2)
    assert result.config == {"num_hidden_layers": 2}


def test_width_rows_are_those_of_the_layers_that_stay():
    values = torch.zeros(6, 6)
    values[torch.arange(6), torch.arange(6)] = 1.0
    result = made({"intermediate_size": 1, "layers": (1, 4)}, Scores(mlp_neurons=values))
    assert result.mlp_neurons == ((1,), (4,))


def test_a_class_without_the_rule_takes_any_hidden_size():
    keep, config = {"hidden_size": 60}, MistralConfig(**{k: v for k, v in CONFIG.items() if k != "model_type"})
    smaller = {**config.to_dict(), **plan(full_scores(), keep, layout_for("mistral"), config.to_dict()).config}
    assert (smaller["hidden_size"], smaller["head_dim"]) == (60, 8)


def test_a_head_size_that_would_be_derived_is_stated():
    config = {key: value for key, value in CONFIG.items() if key != "head_dim"}
    for keep in ({"hidden_size": 32}, {"num_attention_heads": 4}):
        assert plan(full_scores(), keep, LAYOUT, config).config["head_dim"] == 8


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"hidden_size": 128}, r"keep.hidden_size \(128\) is more than the model has \(expected 1 to 64\)"),
        ({"intermediate_size": 7}, r"keep.intermediate_size \(7\) is more"),
        ({"num_attention_heads": 16}, r"keep.num_attention_heads \(16\) is more"),
        ({"num_key_value_heads": 3}, r"keep.num_key_value_heads \(3\) is more"),
        ({"num_hidden_layers": 7}, r"keep.num_hidden_layers \(7\) is more"),
        ({"hidden_size": 60}, r"hidden_size \(60\) must be a multiple of .*\(8\).*llama.*try hidden_size 56 or 64"),
        ({"num_attention_heads": 5}, r"\(5\) must be a multiple of the 2 kept KV groups; try 4"),
        (
            {"num_attention_heads": 8, "num_key_value_heads": 1},
            r"\(8\) is more than the 4 query heads of the 1 kept KV groups",
        ),
        ({"num_hidden_layers": 1}, r"num_hidden_layers \(1\) must be 2 or more"),
        ({"layers": (0, 6)}, r"keep.layers: the model has no layer 6 .*expected indices from 0 to 5"),
        ({"layers": (0, 6, 7, 8, 9, 10, 11)}, r"keep.layers: the model has no layer 6"),
        ({"hidden_size": 0}, r"keep.hidden_size: .*greater than 0.*got 0"),
        ({"hiden_size": 8}, r"keep.hiden_size: .*not permitted"),
        ({"layers": (0,), "num_hidden_layers": 1}, "both set the depth"),
    ],
)
def test_bad_sizes_are_refused(keep, message):
    with pytest.raises(InputError, match=message):
        made(keep)


@pytest.mark.parametrize(
    "keep",
    [
        {"layers": ()},
        {"layers": (1, 0)},
        {"layers": (1, 1)},
        {"layer_choice": "contiguous"},
        {"layers": (0,), "num_hidden_layers": 1},
    ],
)
def test_a_keep_that_contradicts_itself_is_no_spec(keep):
    with pytest.raises(ValidationError):
        KeepSpec(**keep)


def test_a_spec_survives_its_own_dump():
    keep = KeepSpec(hidden_size=8, layers=(0, 2))
    assert KeepSpec.model_validate(keep.model_dump()) == keep == KeepSpec.model_validate(keep.model_dump(mode="json"))


@pytest.mark.parametrize(
    ("scores", "keep", "message"),
    [
        (Scores(), {"num_hidden_layers": 3}, r"needs scores of layers.*such as block_influence"),
        (Scores(), {"intermediate_size": 3}, r"needs scores of mlp_neurons.*such as activation"),
        (Scores(), {"hidden_size": 32}, r"needs scores of hidden_channels"),
        (Scores(), {"num_attention_heads": 4}, r"needs scores of attention_heads"),
        (Scores(layers=torch.ones(5)), {"num_hidden_layers": 3}, r"layers have shape \(5,\), expected \(6,\)"),
    ],
)
def test_scores_that_are_missing_or_of_another_model_are_refused(scores, keep, message):
    with pytest.raises(InputError, match=message):
        made(keep, scores)


@pytest.mark.parametrize(
    ("keep", "sizes"),
    [
        ({"intermediate_size": "50%"}, {"intermediate_size": 5504}),  # 11008 / 2, a multiple of 32
        ({"hidden_size": "33%"}, {"hidden_size": 1344}),  # 1351.7, down to a multiple of 32
        ({"num_hidden_layers": "40%"}, {"num_hidden_layers": 13}),  # 12.8
        ({"num_hidden_layers": "1%"}, {"num_hidden_layers": 2}),  # the first and the last always stay
        ({"num_attention_heads": "60%"}, {"num_attention_heads": 16}),  # 19.2, two heads in each of 8 groups
        (
            {"num_attention_heads": "50%", "num_key_value_heads": "50%"},
            {"num_attention_heads": 16, "num_key_value_heads": 4},
        ),
        ({"intermediate_size": 100}, {"intermediate_size": 100}),
    ],
)
def test_percentages_become_sizes_that_fit(keep: dict[str, object], sizes: dict[str, int]) -> None:
    before = {"mlp_neurons": 11008, "attention_heads": 32, "kv_groups": 8, "layers": 32, "hidden_channels": 4096}
    found = KeepSpec.model_validate(keep).resolved(before)
    assert {key: getattr(found, key) for key in sizes} == sizes
    assert found.num_layers_of(32) == sizes.get("num_hidden_layers", 32)


@pytest.mark.parametrize("size", ["50", "0%", "100%", "half", 3.5, True, 0, -1])
def test_what_is_no_size_is_refused(size: object) -> None:
    with pytest.raises(ValidationError, match=r"whole number, or a percentage|greater than 0"):
        KeepSpec.model_validate({"intermediate_size": size})
