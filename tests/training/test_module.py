"""The gradient that the optimizer sees, against one worked out by hand; the teacher; the schedule."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn import functional

from distill.core.batch import KEPT, causal_batch
from distill.losses import CrossEntropy, ForwardKL
from distill.training.module import DistillationModule
from distill.training.own_weights import OwnWeights
from distill.training.spec import OptimizerSpec


def trainer(**settings: Any) -> pl.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(**{"accelerator": "cpu", "devices": 1, "max_steps": 1} | quiet | settings)


class Watched(DistillationModule):
    """Keeps the gradients of every step, after scaling and after clipping."""

    def configure_optimizers(self) -> Any:
        self.scaled: list[dict[str, Tensor]] = []
        self.clipped: list[dict[str, Tensor]] = []
        return super().configure_optimizers()

    def _now(self) -> dict[str, Tensor]:
        return {name: p.grad.clone() for name, p in self.student.named_parameters() if p.grad is not None}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        self.scaled.append(self._now())

    def configure_gradient_clipping(self, *arguments: Any, **settings: Any) -> None:
        super().configure_gradient_clipping(*arguments, **settings)
        self.clipped.append(self._now())


def watched(module: DistillationModule) -> Watched:
    module.__class__ = Watched
    return module  # type: ignore[return-value]


def by_hand(module: DistillationModule, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradient of the mean over the batch's tokens, from the models' own logits and torch's own losses."""
    assert module.teacher is not None
    student, teacher, mask = module.student, module.teacher.model, batch["mask"]
    assert teacher is not None
    q, p = (model(input_ids=batch["input_ids"]).logits[mask] for model in (student, teacher))
    targets = batch["input_ids"].roll(-1, 1)[mask]
    kl = functional.kl_div((q / 2).log_softmax(-1), (p / 2).softmax(-1).detach(), reduction="batchmean") * 4
    loss = kl + 0.5 * functional.cross_entropy(q, targets)
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(
            ours[name], theirs[name], rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize(("micro", "accumulate"), [(8, 1), (4, 2), (2, 4), (1, 8)])
@pytest.mark.parametrize("way", ["full", "tied", "quant lora head"])
def test_the_optimizer_sees_the_mean_over_the_steps_tokens(
    way: str, micro: int, accumulate: int, module: Any, loader: Any, batch: Any
) -> None:
    model = watched(module(way, tie_word_embeddings=way == "tied"))
    expected = by_hand(model, batch(0, 8))
    norm = torch.stack([g.norm() for g in expected.values()]).norm()
    clip = float(norm) / 3
    trainer(accumulate_grad_batches=accumulate, gradient_clip_val=clip).fit(model, loader(accumulate, micro))
    assert_same(model.scaled[0], expected)
    assert_same(model.clipped[0], {name: g / 3 for name, g in expected.items()})


def test_every_step_has_its_own_tokens(module: Any, loader: Any, batch: Any) -> None:
    model = watched(module(lr=1e-30))  # so that the weights stay
    expected = [by_hand(model, batch(start, 4)) for start in (0, 4, 8)]
    trainer(accumulate_grad_batches=2, max_steps=3).fit(model, loader(6))
    for ours, theirs in zip(model.scaled, expected, strict=True):
        assert_same(ours, theirs)


def test_a_broken_off_step_leaves_nothing_behind(module: Any, loader: Any, batch: Any) -> None:
    model = watched(module(lr=1e-30))
    model._step.tokens += 1000
    trainer().fit(model, loader(1, 4))
    assert_same(model.scaled[0], by_hand(model, batch(0, 4)))


def test_a_step_without_tokens_changes_no_gradient_into_nan(module: Any, loader: Any) -> None:
    model = watched(module())
    trainer(gradient_clip_val=1.0).fit(model, loader(1, 1, start=5))  # row 5 counts for nothing
    assert not any(g.any() for g in model.scaled[0].values())
    assert all(p.isfinite().all() for p in model.student.parameters())


@pytest.mark.parametrize("way", ["full", "lora head", "quant head", "quant lora head"])
def test_bf16_mixed_sees_the_gradient_too(way: str, module: Any, loader: Any, batch: Any) -> None:
    model = watched(module(way, attention_dropout=0.0))
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    for name, p in model.student.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    expected = by_hand(model, batch(0, 8))
    trainer(precision="bf16-mixed", accumulate_grad_batches=2, gradient_clip_val=1e9).fit(model, loader(2, 4))
    assert model.scaled[0].keys() == expected.keys()
    assert any("lm_head" in name for name in expected)
    for name, theirs in expected.items():
        ours = model.scaled[0][name]
        assert ours.dtype == torch.float32
        error = (ours - theirs).norm() / theirs.norm()
        assert error < 0.1, (name, float(error))


def test_bf16_mixed_clips(module: Any, loader: Any) -> None:
    model = watched(module())
    trainer(precision="bf16-mixed", gradient_clip_val=1e-3).fit(model, loader(1))
    norm = torch.stack([g.norm() for g in model.clipped[0].values()]).norm()
    torch.testing.assert_close(norm, torch.tensor(1e-3), rtol=1e-3, atol=0)


def test_the_teacher_stays_out(module: Any, loader: Any, batch: Any) -> None:
    model = module()
    before = {name: p.clone() for name, p in model.teacher.model.named_parameters()}
    assert all(name.startswith("student.") for name in model.state_dict())
    assert len(list(model.parameters())) == len(list(model.student.parameters()))
    model.train()
    assert not model.teacher.model.training
    loop = trainer(max_steps=2)
    loop.fit(model, loader(4))
    assert not model.teacher.model.training
    for name, p in model.teacher.model.named_parameters():
        assert p.grad is None
        assert not p.requires_grad
        assert torch.equal(p, before[name])
    assert model.teacher.signal(batch(0, 2)).hidden.is_inference()
    held = {id(p) for group in loop.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in model.student.parameters()}


@pytest.mark.parametrize("source", ["live", "own weights"])
def test_documents_of_one_row_teach_what_each_teaches_alone(source: str, module: Any) -> None:
    """Neither model sees over the border: a teacher that did would say something else of all but the first one."""
    model = module("full" if source == "live" else "lora")
    if source != "live":
        model.teacher = OwnWeights(model.student)
        for name, p in model.student.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.3)
    model.student.eval()  # no dropout
    ids = torch.randint(1, 32, (2, 11))
    places = torch.cat([torch.arange(size) for size in (3, 5, 3)]).expand(2, -1)
    mask = places.roll(-1, 1) > 0
    packed = causal_batch(ids, mask, position_ids=places)
    total, terms = model.batch_losses(packed, model.losses)
    alone = [
        model.batch_losses(causal_batch(some, on), model.losses)
        for some, on in zip(ids.split((3, 5, 3), 1), mask.split((3, 5, 3), 1), strict=True)
    ]
    assert float(terms["kl"].per_token()) > 0.01
    torch.testing.assert_close(total, sum(part for part, _ in alone), rtol=1e-4, atol=1e-5)
    for name, term in terms.items():
        torch.testing.assert_close(term.sum, sum(part[name].sum for _, part in alone), rtol=1e-4, atol=1e-5)


def test_losses_that_need_a_teacher_say_so(llama: Any) -> None:
    with pytest.raises(ValueError, match=r"forward_kl.*need a teacher"):
        DistillationModule(llama(), [ForwardKL(), CrossEntropy()])


def test_vectors_have_no_weight_decay(module: Any, loader: Any) -> None:
    loop = trainer()
    loop.fit(module(), loader(1))
    matrices, vectors = loop.optimizers[0].param_groups
    assert (matrices["fused"], vectors["fused"]) == (True, True)
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    assert {p.ndim for p in matrices["params"]} == {2}
    assert {p.ndim for p in vectors["params"]} == {1}


class Rates(pl.Callback):
    """The learning rate with which each step is made."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: Any, optimizer: torch.optim.Optimizer) -> None:
        self.seen.append(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("length", [{"max_steps": 5}, {"max_steps": -1, "max_epochs": 1}])
def test_the_schedule_runs_once_over_the_training(length: dict[str, int], module: Any, loader: Any) -> None:
    rates = Rates()
    trainer(accumulate_grad_batches=2, callbacks=[rates], **length).fit(module(), loader(10))
    spec = OptimizerSpec(warmup_steps=2)
    assert rates.seen == pytest.approx([1e-2 * spec.factor(step, 5) for step in range(5)])
    assert rates.seen[:3] == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2])


def test_a_training_without_end_needs_num_steps(module: Any, loader: Any) -> None:
    with pytest.raises(ValueError, match="num_steps"):
        trainer(max_steps=-1, max_epochs=-1).fit(module(), loader(1))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_validate_works_alone(precision: Any, module: Any, loader: Any, batch: Any) -> None:
    model = module()
    trainer(precision=precision).validate(model, loader(4), verbose=False)
    whole = batch(0, 8)
    means = model.validation_means()
    with torch.no_grad():
        q, p = (
            m.eval()(input_ids=whole["input_ids"]).logits[whole["mask"]] for m in (model.student, model.teacher.model)
        )
    targets = whole["input_ids"].roll(-1, 1)[whole["mask"]]
    kl = functional.kl_div(q.log_softmax(-1), p.softmax(-1), reduction="batchmean")
    tolerance = 1e-5 if precision == "32-true" else 0.05
    assert means == pytest.approx(
        {"cross_entropy": functional.cross_entropy(q, targets).item(), "kl": kl.item()}, rel=tolerance
    )


def test_drained_terms_are_means_per_token_since_the_last_time(module: Any, batch: Any) -> None:
    model = module(steps=1, attention_dropout=0.0)
    whole = batch(0, 8)
    _, terms = model.batch_losses(whole, model.losses)
    for start in (0, 2, 4, 6):
        model.training_step(batch(start, 2), 0)
    assert model.drain_terms() == {}, "the step is not made yet"
    model.configure_gradient_clipping(model.configure_optimizers()["optimizer"])
    assert model.drain_terms() == pytest.approx({name: float(t.per_token()) for name, t in terms.items()}, rel=1e-5)
    assert model.drain_terms() == {}


def test_what_counts_is_found_before_the_batch_is_on_a_gpu(module: Any, loader: Any) -> None:
    """The loss is that of a batch whose positions are found by the losses, and the bits are the same."""
    trained, batch = module(), next(iter(loader(1)))
    ready = trained.on_before_batch_transfer(batch, 0)
    assert ready[KEPT].tolist() == batch["mask"].flatten().nonzero().squeeze(1).tolist()
    assert KEPT not in batch
    found, told = (trained.batch_losses(one, trained.losses)[0] for one in (batch, ready))
    assert torch.equal(found, told)


def test_position_ids_stay_only_where_they_restart(module: Any, loader: Any) -> None:
    trained, batch = module(), next(iter(loader(1)))
    places = torch.arange(batch["mask"].shape[1]).expand_as(batch["mask"])
    assert "position_ids" not in trained.on_before_batch_transfer({**batch, "position_ids": places}, 0)
    restarts = places.remainder(3)
    assert trained.on_before_batch_transfer({**batch, "position_ids": restarts}, 0)["position_ids"] is restarts
