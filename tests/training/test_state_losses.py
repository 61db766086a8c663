"""Losses on inner states in training: read through every wrapping, brought to one width, learned, saved, taken off."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from distill.core.errors import InputError
from distill.losses import AttentionRelation, CrossEntropy, ForwardKL, HiddenCosine, HiddenMSE
from distill.pruning.origin import Origin
from distill.training.assemble import _checkpointing, disassemble
from distill.training.checkpoint import checkpoint_path
from distill.training.module import DistillationModule
from distill.training.spec import OptimizerSpec
from distill.training.state_losses import StateLosses
from distill.training.teacher import Teacher

from .test_module import trainer
from .test_resume import BATCH, PulledPlug, assert_same, left_by, pull

DEEP = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
WIDE = {**DEEP, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 3}
LOSSES = [ForwardKL(), HiddenMSE(weight=0.5), HiddenCosine(weight=2.0), AttentionRelation(layers="auto")]


@pytest.fixture
def distillation(llama: Any, student: Any) -> Any:
    """A student wrapped in some way and a larger teacher."""

    def make(way: str = "full", losses: Any = None, recompute: bool = False, **settings: Any) -> DistillationModule:
        model = student(way, **DEEP | settings).model
        if recompute:
            _checkpointing(model, "enable", gradient_checkpointing_kwargs={"use_reentrant": False})
        for name, p in model.named_parameters():
            if "lora_B" in name:
                with torch.random.fork_rng():
                    torch.manual_seed(7)
                    torch.nn.init.normal_(p, std=0.1)
        optimizer = OptimizerSpec(lr=1e-2, warmup_steps=2)
        return DistillationModule(model, losses or LOSSES, llama(1, **WIDE), optimizer=optimizer)

    return make


def states_of(model: Any, input_ids: Tensor) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    """Outputs of every layer and of its projections, from a plain forward pass and from the layers called by hand."""
    blocks: list[Tensor] = []
    handles = [layer.register_forward_hook(lambda _m, _a, out: blocks.append(out)) for layer in model.model.layers]
    model.model(input_ids=input_ids, use_cache=False)
    for handle in handles:
        handle.remove()
    inputs = [model.model.embed_tokens(input_ids), *blocks[:-1]]
    normed = [layer.input_layernorm(x) for layer, x in zip(model.model.layers, inputs, strict=True)]
    return blocks, {
        part: [getattr(layer.self_attn, part)(x) for layer, x in zip(model.model.layers, normed, strict=True)]
        for part in ("q_proj", "k_proj", "v_proj")
    }


def relation(student: Tensor, teacher: Tensor, keep: Tensor, heads: int) -> Tensor:
    """Of one sequence's tokens that count, without chunks."""
    rows = []
    for vectors in (teacher, student):
        cut = vectors[keep].unflatten(-1, (heads, -1)).transpose(0, 1)
        scores = cut @ cut.transpose(1, 2) / cut.shape[-1] ** 0.5
        rows.append(scores.masked_fill(~torch.ones(scores.shape[1:], dtype=torch.bool).tril(), -torch.inf))
    p, log_q = rows[0].softmax(-1), rows[1].log_softmax(-1).nan_to_num(neginf=0.0)
    return (torch.special.xlogy(p, p) - p * log_q).sum() / heads


def by_hand(module: DistillationModule, batch: dict[str, Tensor]) -> Tensor:
    """The loss a token of LOSSES, written out for these two shapes of model."""
    ids, mask = batch["input_ids"], batch["mask"]
    student, teacher = module.student, module.teacher.model  # type: ignore[union-attr]
    (ours, our_vectors), (theirs, their_vectors) = states_of(student, ids), states_of(teacher, ids)
    q, p = (model(input_ids=ids).logits[mask] for model in (student, teacher))
    total = functional.kl_div(q.log_softmax(-1), p.detach().softmax(-1), reduction="sum")
    pairs = [(0, 1), (1, 2)]
    maps = module.states.projections  # type: ignore[union-attr]
    for i, j in pairs:
        target = theirs[j][mask].detach()
        error = (maps["hidden_mse"](ours[i][mask]) - target).square().mean(-1) / target.square().mean(-1)
        total = total + 0.5 * error.sum() / 2
        total = total + 2.0 * (1 - functional.cosine_similarity(maps["hidden_cosine"](ours[i][mask]), target)).sum() / 2
        for part, heads in (("q_proj", 2), ("k_proj", 1), ("v_proj", 1)):
            for one, other, keep in zip(our_vectors[part][i], their_vectors[part][j].detach(), mask, strict=True):
                total = total + relation(one, other, keep, heads) / 6
    return total / mask.sum()


@pytest.mark.parametrize(
    ("way", "recompute", "micro", "accumulate"),
    [
        ("full", False, 8, 1),
        ("full", False, 2, 4),
        ("full", True, 4, 2),
        ("lora", False, 4, 2),
        ("quant lora head", True, 4, 2),
    ],
)
def test_the_optimizer_sees_the_mean_over_the_steps_tokens(
    way: str, recompute: bool, micro: int, accumulate: int, distillation: Any, loader: Any, batch: Any
) -> None:
    model = distillation(way, recompute=recompute)
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    model.train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loss = by_hand(model, batch(0, 8))
    expected = dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))
    trainer(accumulate_grad_batches=accumulate).fit(model, loader(accumulate, micro))
    seen = {name: p.grad for name, p in trained.items() if p.grad is not None}  # nothing clips them here
    assert set(seen) == set(expected)
    assert {"states.projections.hidden_mse.weight", "states.projections.hidden_cosine.weight"} < set(seen)
    for name, gradient in expected.items():
        torch.testing.assert_close(seen[name], gradient, rtol=1e-3, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def test_bf16_mixed_trains_on_the_same_losses(distillation: Any, batch: Any) -> None:
    model, whole = distillation(), batch(0, 8)
    _, exact = model.batch_losses(whole, model.losses)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, rough = model.batch_losses(whole, model.losses)
    total.backward()
    for name, term in exact.items():
        assert rough[name].sum.dtype == torch.float32
        torch.testing.assert_close(rough[name].sum, term.sum, rtol=0.05, atol=0.05)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.states.parameters())


def test_an_attention_mask_adds_no_states_to_a_causal_loss(distillation: Any, batch: Any) -> None:
    """Collators of other programs give one; the states of a prompt, whose labels are -100, stay out of the losses."""
    model, whole = distillation().eval(), batch(0, 6)
    found = []
    for more in ({}, {"attention_mask": torch.ones_like(whole["input_ids"])}):
        given = {**whole, "mask": whole["mask"] & (torch.arange(whole["mask"].shape[1]) > 2), **more}
        found.append(model.batch_losses(given, model.losses)[1])
    for name, term in found[0].items():
        torch.testing.assert_close(found[1][name].sum, term.sum)


def test_masked_tokens_reach_neither_loss_nor_gradient(distillation: Any, batch: Any) -> None:
    """Not even as NaN, and not through the learned map."""
    model, whole = distillation(), batch(0, 6)
    mask = whole["mask"]
    found = []
    for filler in (1.0, float("nan")):
        model.states.zero_grad()
        leaves = []
        for states in (model.states.student, model.states.teacher):
            random = torch.Generator().manual_seed(0)
            for part, layer in sorted(states._watched):
                heads, channels = states.shapes.parts[part]
                state = torch.randn(*mask.shape, heads * channels, generator=random)
                state[~mask] = filler
                states._seen[part, layer] = state.requires_grad_(states is model.states.student)
                leaves.append(state)
        total, _ = model.states({"mask": mask}, [(name, loss) for name, loss in model.losses if name != "forward_kl"])
        total.backward()
        gradients = [leaf.grad for leaf in leaves if leaf.requires_grad] + [p.grad for p in model.states.parameters()]
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert not any(leaf.grad[~mask].any() for leaf in leaves if leaf.requires_grad)
        found.append([total.detach(), *gradients])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_batch_without_tokens_leaves_a_gradient_of_zero(distillation: Any, batch: Any) -> None:
    model = distillation()
    total, terms = model.batch_losses(batch(0, 1), model.losses)  # row 0 counts for nothing
    total.backward()
    assert total.item() == 0
    assert {term.count.item() for term in terms.values()} == {0}
    assert all(p.grad is not None and not p.grad.any() for p in model.states.parameters())


def test_nothing_is_kept_between_batches_and_validation_reads_nothing(distillation: Any, batch: Any) -> None:
    model = distillation()
    model.on_validation_epoch_start()
    model.validation_step(batch(0, 4), 0)
    assert set(model.validation_means()) == {"cross_entropy", "kl"}
    assert not model.states.student._seen
    model.training_step(batch(0, 4), 0)
    assert not model.states.student._seen
    assert not model.states.teacher._seen
    assert set(model._step.terms) == {loss.kind for loss in LOSSES} | {"kl"}


def test_equal_models_agree_at_once(llama: Any, batch: Any) -> None:
    model = DistillationModule(llama(0, **DEEP), LOSSES, llama(0, **DEEP))
    assert not model.states.projections  # type: ignore[union-attr]
    total, terms = model.batch_losses(batch(0, 8), model.losses)
    total.backward()
    assert all(abs(term.sum.item()) < 1e-4 for term in terms.values())


@pytest.mark.parametrize("learned", [False, True])
def test_a_student_that_was_cut_out_meets_the_channels_that_were_kept(learned: bool, llama: Any, batch: Any) -> None:
    from distill.models.layouts import layout_for
    from distill.pruning.base import Scores
    from distill.pruning.layout import config_of
    from distill.pruning.plan import plan
    from distill.pruning.surgery import apply

    teacher, layout = llama(1, **WIDE), layout_for("llama")
    scores = Scores(hidden_channels=torch.randn(24), layers=torch.randn(3))
    the_plan = plan(scores, {"hidden_size": 12, "num_hidden_layers": 2}, layout, config_of(teacher))
    origin = Origin(the_plan.layers, the_plan.hidden_channels)
    loss = HiddenMSE(projection="learned" if learned else "auto", scale="none")
    model = DistillationModule(apply(teacher, the_plan, layout), [ForwardKL(), loss], teacher, origin=origin)
    assert bool(model.states.projections) == learned  # type: ignore[union-attr]
    whole = batch(0, 8)
    _, terms = model.batch_losses(whole, model.losses)
    mask, channels = whole["mask"], list(the_plan.hidden_channels)
    (ours, _), (theirs, _) = (states_of(m, whole["input_ids"]) for m in (model.student, teacher))
    expected = 0.0
    for i, j in enumerate(the_plan.layers):
        ours_i, target = ours[i][mask], theirs[j][mask]
        if learned:  # starts with the kept channels where they were, and nothing in the others
            ours_i = torch.zeros_like(target).index_copy(-1, torch.tensor(channels), ours_i)
        else:
            target = target[:, channels]
        expected += (ours_i - target).square().mean(-1).sum().item() / 2
    assert terms["hidden_mse"].sum.item() == pytest.approx(expected, rel=1e-4)
    line = f"0 <- {the_plan.layers[0]}, 1 <- {the_plan.layers[1]}"
    assert line in model.states.summary()[0]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("way", "recompute", "precision"), [("full", True, "32-true"), ("quant lora head", False, "bf16-mixed")]
)
def test_a_kill_changes_no_bit_of_student_or_map(
    way: str, recompute: bool, precision: str, distillation: Any, train: Any, tmp_path: Any
) -> None:
    for folder, seed, at in (("straight", 3, None), ("resumed", 3, {4 * BATCH: pull}), ("resumed", 4, None)):
        torch.manual_seed(seed)
        model = distillation(way, recompute=recompute, attention_dropout=0.1)
        if at is not None:
            with pytest.raises(PulledPlug):
                train(model, folder, at=at, precision=precision)
        else:
            train(model, folder, precision=precision)
    straight, resumed = left_by(tmp_path / "straight"), left_by(tmp_path / "resumed")
    assert_same(resumed, straight)
    name = "states.projections.hidden_mse.weight"
    fresh = distillation(way).state_dict()[name]
    assert not torch.equal(straight["state_dict"][name], fresh)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(straight["optimizer_states"][0]["state"]) == len(trained)


@pytest.mark.parametrize("way", ["full", "quant lora head"])
def test_the_student_is_handed_back_without_them(way: str, student: Any, llama: Any, train: Any, tmp_path: Any) -> None:
    from transformers import LlamaForCausalLM

    made = student(way, **DEEP)
    model = DistillationModule(made.model, LOSSES, llama(1, **WIDE), optimizer=OptimizerSpec(lr=1e-2))
    train(model)
    held = torch.load(checkpoint_path(tmp_path / "stage" / "checkpoints", 6), weights_only=True)["state_dict"]
    assert {name for name in held if name.startswith("states.")} == {
        "states.projections.hidden_mse.weight",
        "states.projections.hidden_cosine.weight",
    }
    plain = disassemble(made)
    plain.save_pretrained(tmp_path / "model")
    loaded, report = LlamaForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert loaded.num_parameters() == llama(0, **DEEP).num_parameters()


def test_random_numbers_of_the_run_do_not_move_by_a_loss(distillation: Any) -> None:
    torch.manual_seed(0)
    expected = torch.rand(4)
    torch.manual_seed(0)
    one, other = distillation(), distillation()
    assert torch.equal(torch.rand(4), expected)
    name = "hidden_mse"
    assert torch.equal(one.states.projections[name].weight, other.states.projections[name].weight)


class Written(Teacher):
    """Has no model to be watched."""

    def move(self, device: torch.device) -> None:
        pass

    def signal(self, batch: dict[str, Tensor]) -> Any:
        raise AssertionError


def test_what_cannot_be_served_is_refused_by_name(llama: Any, distillation: Any) -> None:
    with pytest.raises(InputError, match=r"losses: hidden_mse reads the teacher's hidden layers, and a cache"):
        DistillationModule(llama(**DEEP), [CrossEntropy(), HiddenMSE()], Written())
    with pytest.raises(ValueError, match="no loss on the predictions"):
        DistillationModule(llama(**DEEP), [HiddenMSE()], llama(**DEEP))
    with pytest.raises(ValueError, match=r"hidden_cosine.*need a teacher"):
        DistillationModule(llama(**DEEP), [CrossEntropy(), HiddenCosine()])
    with pytest.raises(InputError, match=r"num_relation_heads \(5\) must divide the student's 16 channels"):
        distillation(losses=[ForwardKL(), AttentionRelation(num_relation_heads=5)])
    with pytest.raises(InputError, match=r"hidden_mse\.layers: the teacher has no layer 3"):
        distillation(losses=[ForwardKL(), HiddenMSE(layers=((0, 3),))])
    with pytest.raises(ValueError, match="does not belong to this student"):
        StateLosses([HiddenMSE()], llama(**DEEP), llama(1, **WIDE), Origin((0, 1, 2), tuple(range(16))))


def test_an_unknown_architecture_is_refused_by_name(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.models.layouts.LAYOUTS", {})
    with pytest.raises(InputError, match=r"'llama' has no layout"):
        DistillationModule(llama(), [ForwardKL(), HiddenMSE()], llama())


def test_a_module_that_is_passed_by_is_an_error(distillation: Any) -> None:
    with pytest.raises(InputError, match=r"the output 'block' of layer 0 was not recorded"):
        distillation().states.student.take()
