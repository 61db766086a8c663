"""Every architecture through the same surgery, on tiny random models of the real classes."""

import copy
import dataclasses
import functools
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from distill.core.batch import causal_batch
from distill.core.errors import InputError
from distill.core.stored import parse_stored
from distill.models.head import check_head
from distill.models.layouts import LAYOUTS, layout_for
from distill.models.packed import check_apart
from distill.models.weight_files import prune_folder
from distill.pruning.base import Scores
from distill.pruning.plan import Plan, plan
from distill.pruning.random import random
from distill.pruning.reconstruct import reconstruct
from distill.pruning.surgery import apply

from .architectures import GROUPS, HIDDEN, LAYERS, MODELS, NEURONS, VOCABULARY, make, masked

TIED_HEADS = ("gpt2", "pythia", "gpt_neox", "bert", "roberta", "distilbert")
ANY = {
    "mlp": {"intermediate_size": 20},
    "layers": {"layers": (0, 2, 3)},
    "vocabulary": {},
}
SMALLER = {"hidden_size": 48, "intermediate_size": 32, "layers": [1, 3]}
FREE = {
    "heads": {"num_attention_heads": 2},
    "hidden": {"hidden_size": 40},
}
GROUPED = {
    "kv_groups": {"num_key_value_heads": 1},
    "pooled": {"num_key_value_heads": 1, "group_choice": "pool"},
    "pooled_fewer_heads": {"num_key_value_heads": 1, "group_choice": "pool", "num_attention_heads": 2},
    "silenced": {"num_key_value_heads": 1, "group_choice": "silence"},
    "all": {**SMALLER, "num_attention_heads": 1, "num_key_value_heads": 1},
}
TIED = {
    "width": {"hidden_size": 32, "num_attention_heads": 2},
    "all": {**SMALLER, "num_attention_heads": 3},
}
EXPERTS = {
    "experts": {"num_experts": 2},
    "all": {**GROUPED["all"], "num_experts": 3},
}
KEPT_TOKENS = [0, 1, *range(100, 50, -3), 7]


def cuts_of(name):
    if name.startswith(TIED_HEADS):
        return {**ANY, **TIED}
    if "no_groups" in name:
        return {**ANY, **FREE, "all": {**TIED["all"]}, "pooled": GROUPED["pooled"]}
    return {**ANY, **FREE, **GROUPED, **(EXPERTS if "mixtral" in name or "moe" in name else {})}


CASES = [(name, cut) for name in MODELS for cut in cuts_of(name)]
each_cut = pytest.mark.parametrize(("name", "cut"), CASES, ids=[f"{name}-{cut}" for name, cut in CASES])
each = pytest.mark.parametrize("name", MODELS)


@functools.cache
def model_of(name):
    """Shared by the tests, which change copies only."""
    return make(name)


def is_causal(name):
    return layout_for(model_of(name).config.model_type).task == "causal_lm"


def planned(model, keep, vocabulary=None, seed=3):
    layout = layout_for(model.config.model_type)
    config = model.config.to_dict()
    return plan(random(layout.sizes(config), seed), keep, layout, config, vocabulary), layout


@functools.cache
def pruned_of(name, cut):
    """Shared by the tests, which change copies only."""
    model = model_of(name)
    made, layout = planned(model, cuts_of(name)[cut], KEPT_TOKENS if cut == "vocabulary" else None)
    return apply(model, made, layout), made


@pytest.fixture(scope="module")
def ids():
    return torch.randint(2, len(KEPT_TOKENS), (3, 12), generator=torch.Generator().manual_seed(1))


@each
def test_keeping_everything_is_the_identity(name, ids):
    model = model_of(name)
    sizes = layout_for(model.config.model_type).sizes(model.config.to_dict())
    assert (sizes["hidden_channels"], sizes["layers"], sizes["vocabulary"]) == (HIDDEN, LAYERS, VOCABULARY)
    everything = {"hidden_size": HIDDEN, "intermediate_size": sizes["mlp_neurons"], "num_hidden_layers": LAYERS}
    made, layout = planned(model, everything, range(VOCABULARY))
    pruned = apply(model, made, layout)
    assert made.config == {}
    assert not pruned.training
    named = {"dtype": "float32", "architectures": [type(model).__name__]}  # as save_pretrained names it
    assert pruned.config.to_dict() == model.config.to_dict() | named
    before, after = model.state_dict(), pruned.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(model(ids).logits, pruned(ids).logits)
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(model.parameters(), pruned.parameters(), strict=True))


@each_cut
@torch.no_grad()
def test_pruned_equals_masked(name, cut, ids):
    model = model_of(name)
    before = copy.deepcopy(model.state_dict())
    pruned, made = pruned_of(name, cut)
    tokens = torch.tensor(made.vocabulary or range(VOCABULARY))
    expected = masked(name, model, made)(tokens[ids]).logits[..., tokens]
    torch.testing.assert_close(pruned(ids).logits, expected, rtol=0, atol=2e-5 * expected.abs().max().item())
    if cut != "vocabulary":
        assert (expected - model(ids).logits).abs().max() > 1e-2  # the cut is felt
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


@each_cut
def test_forecast_is_the_truth_and_the_plan_a_round_trip(name, cut):
    pruned, made = pruned_of(name, cut)
    assert made.parameters == sum(p.numel() for p in pruned.parameters())
    assert made.parameters_before == sum(p.numel() for p in model_of(name).parameters())
    assert made.parameters < made.parameters_before or cut == "silenced"
    assert parse_stored(json.dumps(made.to_dict()), Plan, "plan.json", "prune again") == made


@each
def test_vanilla_transformers_loads_and_generates(name, ids, tmp_path):
    model = model_of(name)
    pruned, _ = pruned_of(name, "all")
    pruned.save_pretrained(tmp_path)
    auto = AutoModelForCausalLM if is_causal(name) else AutoModelForMaskedLM
    loaded, report = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(model)
    assert not any(report.values()), report
    assert torch.equal(loaded(ids).logits, pruned(ids).logits)
    for one in (pruned, loaded):
        tied = one.get_output_embeddings().weight is one.get_input_embeddings().weight
        assert tied == model.config.tie_word_embeddings
        if is_causal(name):
            check_head(one)
            check_apart(one)
            cached, uncached = (
                one.generate(ids, max_new_tokens=10, do_sample=False, use_cache=cache) for cache in (True, False)
            )
            assert cached.shape == (3, 22)
            assert torch.equal(cached, uncached)


@each
def test_shards_give_the_same_bits_as_memory(name, tmp_path):
    model = model_of(name)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    for cut in ("all", "vocabulary"):
        pruned, made = pruned_of(name, cut)
        layout = layout_for(model.config.model_type)
        carved = prune_folder(str(tmp_path), made, layout, torch.float32)
        assert type(carved) is type(pruned)
        assert carved.config.to_diff_dict() == {**pruned.config.to_diff_dict(), "architectures": [type(model).__name__]}
        expected = pruned.state_dict()
        assert expected.keys() == carved.state_dict().keys()
        assert all(torch.equal(expected[key], tensor) for key, tensor in carved.state_dict().items())
        buffers = dict(pruned.named_buffers())
        assert all(torch.equal(buffers[key], buffer) for key, buffer in carved.named_buffers())


@each
def test_backward_reaches_every_parameter(name, ids):
    pruned = copy.deepcopy(pruned_of(name, "all")[0]).train()
    pruned(ids, labels=ids).loss.backward()
    unused = {"cls.predictions.bias", "lm_head.bias"} if not model_of(name).config.tie_word_embeddings else set()
    for key, parameter in pruned.named_parameters():
        assert parameter.grad is not None or key in unused, key
        assert parameter.grad is None or parameter.grad.isfinite().all(), key
    assert all(parameter.grad is None for parameter in model_of(name).parameters())


@each
def test_dtype_mode_and_attention_implementation_carry_over(name):
    half = copy.deepcopy(model_of(name)).to(torch.bfloat16).train()
    half.set_attn_implementation("eager")
    made, layout = planned(half, cuts_of(name)["all"])
    pruned = apply(half, made, layout)
    assert {p.dtype for p in pruned.parameters()} == {torch.bfloat16}
    assert pruned.training
    assert pruned.config._attn_implementation == "eager"


@each
def test_layers_and_what_is_said_of_each_follow(name):
    model = model_of(name)
    pruned, made = pruned_of(name, "all")
    old = getattr(model.config, "layer_types", None)
    listed = ("qwen2", "qwen3", "gemma", "smollm3")
    assert (old is not None) == model.config.model_type.startswith(listed) or "moe" in name
    if old is not None:
        assert pruned.config.layer_types == [old[1], old[3]] == made.config["layer_types"]
    if name == "smollm3":
        assert model.config.no_rope_layers == [1, 0, 1, 0]
        assert pruned.config.no_rope_layers == [0, 0] == made.config["no_rope_layers"]
    indices = [module.layer_idx for module in pruned.modules() if isinstance(getattr(module, "layer_idx", None), int)]
    assert sorted({*indices}) == [0, 1] or (not indices and "distilbert" in name)


@each
@torch.no_grad()
def test_watched_modules_see_what_the_layout_says(name, ids):
    model = copy.deepcopy(model_of(name))
    layout = layout_for(model.config.model_type)
    sizes = layout.sizes(model.config.to_dict())
    heads, groups = (sizes[axis] * sizes["head_dim"] for axis in ("attention_heads", "kv_groups"))
    entering = {layout.block: HIDDEN, layout.attention_out: heads, **dict.fromkeys(layout.reads, HIDDEN)}
    leaving = {layout.block: HIDDEN}
    for part, path in layout.projections.items():
        leaving[path] = heads if part == "queries" else groups
    if layout.mlp_down is not None:
        entering[layout.mlp_down] = sizes["mlp_neurons"]
    seen = set()

    def hook(path):
        def look(module, args, kwargs, output):
            given = args[0] if args else kwargs["hidden_states"]
            output = output[0] if isinstance(output, tuple) else output
            assert path not in entering or given.shape == (*ids.shape, entering[path])
            assert path not in leaving or output.shape == (*ids.shape, leaving[path])
            seen.add(path)

        return look

    for path in {*entering, *leaving}:
        model.get_submodule(path.format(layer=1)).register_forward_hook(hook(path), with_kwargs=True)
    if layout.experts is not None:
        experts = model.get_submodule(layout.experts.format(layer=1))
        shapes = [(ids.numel(), HIDDEN), (ids.numel(), 2), (ids.numel(), 2)]
        experts.register_forward_pre_hook(lambda _, args: seen.add([tuple(a.shape) for a in args] == shapes))
    model.get_submodule(layout.body)(ids)
    assert seen == {*entering, *leaving} | ({True} if layout.experts is not None else set())


@each
def test_a_forgotten_parameter_is_refused(name):
    model = model_of(name)
    made, layout = planned(model, {})
    for missing in range(len(layout.parameters)):
        row = layout.parameters[missing]
        if not row.exists(model.config.to_dict()):
            continue
        short = dataclasses.replace(layout, parameters=tuple(p for p in layout.parameters if p is not row))
        with pytest.raises(InputError, match=r"expected no such parameter"):
            apply(model, made, short)


@each
def test_sizes_that_its_class_refuses_are_refused_by_the_plan(name):
    """Where the plan says yes, the class does too; where it says no, the class would have refused or built another."""
    model = model_of(name)
    refused = built = 0
    for hidden in (36, 40, 48):
        for heads in (1, 2, 3):
            keep = {"hidden_size": hidden, "num_attention_heads": heads, "intermediate_size": 8}
            try:
                made, _ = planned(model, keep)
            except InputError:
                refused += 1
                continue
            built += 1
            with torch.device("meta"):
                smaller = type(model)(type(model.config).from_dict({**model.config.to_dict(), **made.config}))
            assert sum(p.numel() for p in smaller.parameters()) == made.parameters
    assert built
    assert refused


@each
def test_the_vocabulary_moves_the_special_tokens(name):
    model = copy.deepcopy(model_of(name))
    model.config.eos_token_id, model.config.bos_token_id = [100, 7], 0
    if is_causal(name):
        model.generation_config.eos_token_id = [100, 7]
    made, layout = planned(model, {}, KEPT_TOKENS)
    pruned = apply(model, made, layout)
    told = pruned.generation_config if is_causal(name) else pruned.config
    assert made.config["eos_token_id"] == told.eos_token_id == [2, len(KEPT_TOKENS) - 1]
    assert (pruned.config.bos_token_id, pruned.config.vocab_size) == (0, len(KEPT_TOKENS))
    with pytest.raises(InputError, match="eos_token_id is token 7, which is not in the vocabulary to keep"):
        planned(model, {}, KEPT_TOKENS[:-1])
    with pytest.raises(InputError, match="has token 101, expected ids from 0 to 100"):
        planned(model, {}, [*KEPT_TOKENS, 101])
    with pytest.raises(InputError, match="without repetition"):
        planned(model, {}, [0, 0])


def test_what_generation_bans_moves_with_the_vocabulary(ids):
    """Tokens and phrases that are gone can no longer be said, and are no longer banned; the student still generates."""
    model, gone = copy.deepcopy(model_of("llama")), 100
    kept, place = list(range(1, 100)), {token: token - 1 for token in range(1, 100)}
    model.generation_config.update(
        forced_eos_token_id=3,
        suppress_tokens=[gone, 50],
        begin_suppress_tokens=[gone],
        bad_words_ids=[[60], [61, gone], [62, 63]],
        sequence_bias={(70,): -3.0, (71, gone): 2.0},
        eos_token_id=2,
        bos_token_id=1,
        pad_token_id=None,
    )
    model.config.eos_token_id, model.config.bos_token_id, model.config.pad_token_id = 2, 1, None
    made, layout = planned(model, {}, kept)
    pruned = apply(model, made, layout)
    told = pruned.generation_config
    assert (told.forced_eos_token_id, told.suppress_tokens) == (place[3], [place[50]])
    assert told.begin_suppress_tokens is None
    assert told.bad_words_ids == [[place[60]], [place[62], place[63]]]
    assert told.sequence_bias == [[[place[70]], -3.0]]
    said = pruned.generate(ids[:1, :4].clamp(max=98), max_new_tokens=3, do_sample=False)
    assert said.shape[1] <= 7
    with pytest.raises(InputError, match="forced_eos_token_id is token 3, which"):
        apply(model, planned(model, {}, [1, 2, *range(4, 100)])[0], layout)


def test_every_layout_is_tried():
    assert {model_of(name).config.model_type for name in MODELS} == set(LAYOUTS)


def test_epsilon_matters_in_these_tests(ids):
    """A test of the tests: with epsilon or the weight left as it was, pruned != masked would be seen."""
    pruned, made = copy.deepcopy(pruned_of("llama", "hidden"))
    expected = masked("llama", model_of("llama"), made)(ids).logits
    for layer in pruned.model.layers:
        layer.input_layernorm.variance_epsilon *= 40 / 64
    error = (pruned(ids).logits - expected).abs().max()
    assert error > 1e-3 * expected.abs().max()


def test_pooling_needs_no_scores_of_groups_and_silence_keeps_the_heads():
    model = model_of("llama")
    layout, config = layout_for("llama"), model.config.to_dict()
    pooled = plan(Scores(), {"num_key_value_heads": 1, "group_choice": "pool"}, layout, config)
    assert pooled.attention_heads == (tuple(range(4)),) * LAYERS
    assert pooled.summary()[0] == "KV groups 2 -> 1 in each of 4 layers, pooled"
    scores = Scores(kv_groups=torch.tensor([[0.0, 1.0]] * LAYERS))
    silent = plan(scores, {"num_key_value_heads": 1, "group_choice": "silence"}, layout, config)
    assert silent.attention_heads == ((2, 3, 0, 1),) * LAYERS
    assert silent.silent_heads(0) == [2, 3]
    assert silent.after["attention_heads"] == 4
    assert silent.after["kv_groups"] == 1 == GROUPS - 1
    pruned = apply(model, silent, layout)
    pruned(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    silenced = pruned.model.layers[0].self_attn.o_proj
    assert not silenced.weight[:, 16:].any()
    assert silenced.weight.grad[:, 16:].any()  # so that they can learn anew


@pytest.mark.parametrize(
    ("name", "keep", "message"),
    [
        ("gpt2", {"num_attention_heads": 2}, r"hidden_size \(64\) must be num_attention_heads \(2\) x 16 = 32, .*gpt2"),
        ("bert", {"hidden_size": 40}, r"cut both, such as hidden_size 32 with num_attention_heads 2"),
        ("pythia", {"num_key_value_heads": 2}, r"keep.num_key_value_heads: gpt_neox has no KV groups of several heads"),
        ("llama", {"num_experts": 2}, r"keep.num_experts: llama has no experts"),
        ("mixtral", {"num_experts": 1}, r"num_experts \(1\) must be at least the number of experts per token"),
        ("gemma3", {"hidden_size": 42}, r"hidden_size \(42\) must be a multiple of num_attention_heads \(4\)"),
    ],
)
def test_what_an_architecture_cannot_be_is_refused_by_name(name, keep, message):
    with pytest.raises(InputError, match=message):
        planned(model_of(name), keep)


def test_long_context_phi_keeps_the_ratio_of_hidden_size_and_heads():
    model = copy.deepcopy(model_of("phi4_mini"))
    factors = [1.0] * 6  # of 16 x 0.75 / 2 rotary channels
    model.config.rope_parameters |= {"rope_type": "longrope", "short_factor": factors, "long_factor": factors}
    with pytest.raises(InputError, match=r"hidden_size \(48\) must be num_attention_heads \(4\) x 16"):
        planned(model, {"hidden_size": 48})
    made, layout = planned(model, {"hidden_size": 32, "num_attention_heads": 2})
    assert apply(model, made, layout).config.hidden_size == 32


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("gpt2", "scale_attn_by_inverse_layer_idx", True),
        ("qwen3_moe", "mlp_only_layers", [1]),
        ("qwen3_moe", "decoder_sparse_step", 2),
        ("bert", "is_decoder", True),
    ],
)
def test_a_variant_that_a_layout_does_not_describe_is_refused(name, key, value):
    model = copy.deepcopy(model_of(name))
    setattr(model.config, key, value)
    with pytest.raises(InputError, match=f"with {key} .* is not supported"):
        planned(model, {})


def test_roberta_keeps_the_padding_token_at_its_place():
    with pytest.raises(
        InputError, match=r"pad_token_id \(1\) would become 0, but roberta computes positions from this id"
    ):
        planned(model_of("roberta"), {}, [1, 0])


def test_neurons_are_stated_where_they_would_be_derived():
    made, _ = planned(model_of("gpt2_untied_derived"), {"hidden_size": 32, "num_attention_heads": 2})
    assert made.config["n_inner"] == 4 * HIDDEN
    assert made.config["n_inner"] != NEURONS


@each
def test_reconstruction_lowers_the_error(name):
    """Least squares on the calibration set cannot be worse there than the weights as cut."""
    model = copy.deepcopy(model_of(name))
    made, layout = planned(model, cuts_of(name)["all"])
    pruned = apply(model, made, layout)
    ids = torch.randint(0, VOCABULARY, (8, 12), generator=torch.Generator().manual_seed(2))
    before, after = reconstruct(
        pruned, model, made, layout, [causal_batch(ids, torch.ones_like(ids, dtype=torch.bool))], ridge=0.01
    )
    assert after < before
    with torch.no_grad():
        assert torch.isfinite(pruned(input_ids=ids).logits).all()
