"""Own sequences: what is drawn, what counts, what carries gradient; which steps; the alarms; a kill; refusals."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader

from distill.core.batch import causal_batch
from distill.core.errors import DistillError, InputError
from distill.losses import CrossEntropy, ForwardKL, JensenShannon, LossSpec, ReverseKL, Schedule
from distill.training.alarms import Alarms
from distill.training.checkpoint import checkpoint_path
from distill.training.ends import agreed_ends
from distill.training.metrics import read_rows
from distill.training.module import DistillationModule
from distill.training.on_policy import OnPolicy, repetition, sample, until_end
from distill.training.sharded import Sharded
from distill.training.spec import DistillSpec, OnPolicySpec, OptimizerSpec

VOCABULARY, LENGTH, PROMPT, NEW = 32, 8, 3, 5
ENDS = (3, 7)


def spec(**settings: Any) -> OnPolicySpec:
    return OnPolicySpec(**{"share": 1.0, "prompt_tokens": PROMPT, "max_new_tokens": NEW} | settings)


def policy(**settings: Any) -> OnPolicy:
    return OnPolicy(spec(**settings), seed=0, ends=ENDS, vocabulary=VOCABULARY)


def texts(start: int, count: int) -> dict[str, Tensor]:
    """Whole blocks of text, the same for the same numbers."""
    rows = [
        torch.randint(0, VOCABULARY, (LENGTH,), generator=torch.Generator().manual_seed(start + i))
        for i in range(count)
    ]
    mask = torch.ones(count, LENGTH, dtype=torch.bool)
    mask[:, -1] = False
    return causal_batch(torch.stack(rows), mask)


def whole(prompts: Tensor) -> Tensor:
    """Lengths of prompts without filling."""
    return torch.full((len(prompts),), prompts.shape[1])


def uniform(rows: int, start: int = 0) -> Tensor:
    return torch.stack([policy()._uniform(0, start + row) for row in range(rows)])


@pytest.fixture
def own(student: Any, llama: Any) -> Any:
    """A distillation with on-policy samples in every step."""

    def make(way: str = "full", losses: list[LossSpec] | None = None, lr: float = 1e-2, **settings: Any) -> Any:
        model = {key: settings.pop(key) for key in ("attention_dropout",) if key in settings}
        return DistillationModule(
            student(way, **model).model,
            losses or [ReverseKL()],
            llama(1),
            on_policy=policy(**settings),
            optimizer=OptimizerSpec(lr=lr, warmup_steps=2),
            num_steps=6,
        )

    return make


def written(module: DistillationModule, batch: dict[str, Tensor], start: int = 0) -> tuple[Tensor, Tensor]:
    """Sequences and entropies of step 0 at a batch's prompts."""
    return sample(
        module.student,
        batch["input_ids"][:, :PROMPT],
        torch.full((len(batch["mask"]),), PROMPT),
        None,
        uniform(len(batch["mask"]), start),
        spec(),
        ENDS,
        VOCABULARY,
    )


def one_step(module: DistillationModule, batch: dict[str, Tensor], micro: int, **settings: Any) -> dict[str, Tensor]:
    """The gradient with which the optimizer makes one step, which stays behind."""
    rows = len(batch["mask"])
    parts = [{key: value[at : at + micro] for key, value in batch.items()} for at in range(0, rows, micro)]
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=1,
        accumulate_grad_batches=rows // micro,
        enable_model_summary=False,
        **quiet,
        **settings,
    )
    trainer.fit(module, DataLoader(parts, batch_size=None))  # type: ignore[arg-type]
    return {name: p.grad for name, p in module.student.named_parameters() if p.grad is not None}


# ------------------------------------------------------------------------------------------------------- what is drawn


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_each_token_is_the_one_that_its_number_falls_on(temperature: float, llama: Any) -> None:
    """Against the distributions of whole forward passes in float64, without a cache."""
    model, prompts, numbers = llama().double(), texts(0, 20)["input_ids"][:, :PROMPT], uniform(20)
    sequences, entropy = sample(
        model, prompts, whole(prompts), None, numbers, spec(temperature=temperature), ENDS, VOCABULARY
    )
    found, ended = until_end(sequences[:, PROMPT:], ENDS)
    assert ended.any()
    assert not ended.all()
    for row in range(20):
        for t in range(int(found[row].sum())):
            with torch.no_grad():
                logits = model(sequences[row : row + 1, : PROMPT + t]).logits[0, -1]
            q = logits.softmax(-1)
            assert float(entropy[row, t]) == pytest.approx(float(-(q * q.log()).sum()), abs=1e-4)
            up_to = np.cumsum((logits / temperature).softmax(-1).numpy())
            assert int(sequences[row, PROMPT + t]) == int((up_to <= float(numbers[row, t])).sum())


def test_what_is_drawn_follows_the_distribution(llama: Any) -> None:
    """20,000 first tokens at one prompt: each one's share within five standard errors."""
    model, prompt, count = llama(), texts(3, 1)["input_ids"][:, :PROMPT], 20_000
    numbers = torch.rand(count, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    many = prompt.expand(count, -1)
    drawn, _ = sample(model, many, whole(many), None, numbers, spec(max_new_tokens=1), ENDS, VOCABULARY)
    with torch.no_grad():
        p = model(prompt).logits[0, -1].softmax(-1)
    share = torch.bincount(drawn[:, -1], minlength=VOCABULARY) / count
    assert ((share - p).abs() <= 5 * (p * (1 - p) / count).sqrt() + 1e-9).all()


def test_prompts_of_different_lengths_are_continued_as_each_alone(llama: Any) -> None:
    model, ids, lengths = llama().double(), texts(0, 12)["input_ids"], torch.arange(12) % 4 + 2
    together, entropy = sample(model, ids, lengths, None, uniform(12), spec(), ENDS, VOCABULARY)
    for row, length in enumerate(lengths.tolist()):
        prompt = ids[row : row + 1, :length]
        alone, own = sample(model, prompt, whole(prompt), None, uniform(1, row), spec(), ENDS, VOCABULARY)
        wrote, _ = until_end(alone[:, length:], ENDS)
        end = length + int(wrote.sum())
        assert together[row, :end].tolist() == alone[0, :end].tolist()
        assert set(together[row, end:].tolist()) <= {*ENDS}  # nothing of the prompt behind it
        torch.testing.assert_close(entropy[row, : int(wrote.sum())], own[wrote], rtol=0, atol=1e-6)


def test_rows_that_pad_the_head_are_never_written(llama: Any) -> None:
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[30:] = 0
        model.lm_head.weight[:30] *= 0.01  # so that the padding would be drawn
    prompts = texts(0, 40)["input_ids"][:, :PROMPT] % 20
    wide, _ = sample(model, prompts, whole(prompts), None, uniform(40), spec(), ENDS, VOCABULARY)
    assert wide.max() >= 20
    narrow, _ = sample(model, prompts, whole(prompts), None, uniform(40), spec(), ENDS, 20)
    assert narrow.max() < 20


@pytest.mark.parametrize("way", ["full", "lora", "quant", "quant lora head"])
def test_the_sampling_leaves_no_trace(way: str, own: Any) -> None:
    """Neither in the model, its settings and modes nor in the global random state; and its settings do not act."""
    module = own(way, attention_dropout=0.3)
    module.student.gradient_checkpointing_enable()
    plain, _ = written(module.eval(), texts(0, 4))
    module.student.generation_config.repetition_penalty = 9.0
    module.student.generation_config.max_length = 4
    module.train()
    before = {name: value.clone() for name, value in module.student.state_dict().items()}
    state = torch.get_rng_state()
    again, _ = written(module, texts(0, 4))
    assert torch.equal(plain, again)
    assert torch.equal(state, torch.get_rng_state())
    assert all(part.training for part in module.student.modules())
    assert module.student.is_gradient_checkpointing
    assert module.student.generation_config.repetition_penalty == 9.0
    assert all(torch.equal(value, before[name]) for name, value in module.student.state_dict().items())
    assert all(p.grad is None for p in module.student.parameters())


# ---------------------------------------------------------------------------------------------- what counts, and learns


def test_what_counts_is_what_was_written_up_to_its_end(own: Any) -> None:
    module, batch = own(), texts(0, 12)
    source = module.on_policy.source(module.student, batch, module.losses, 0, 6, 0)
    ids, mask = source.batch["input_ids"], source.batch["mask"]
    assert torch.equal(ids[:, :PROMPT], batch["input_ids"][:, :PROMPT])
    lengths = []
    for row, counted in zip(ids.tolist(), mask.tolist(), strict=True):
        new = row[PROMPT:]
        first = next((i + 1 for i, token in enumerate(new) if token in ENDS), len(new))
        predicted = [i + 1 for i, on in enumerate(counted) if on]
        assert predicted == list(range(PROMPT, PROMPT + first))
        lengths.append(first)
    assert 1 <= min(lengths) < max(lengths) == NEW
    assert int(source.tokens) == sum(lengths) + 12 * PROMPT
    figures = {name: float(term.per_token()) for name, term in source.figures.items()}
    assert figures["on_policy/length"] == pytest.approx(sum(lengths) / 12)
    assert figures["on_policy/generated_share"] == 1.0
    assert int(source.figures["on_policy/generated_share"].count) == sum(lengths)


def test_a_block_that_ends_within_its_prompt_counts_for_nothing(own: Any) -> None:
    module, batch = own(), texts(0, 2)
    batch["mask"][1, PROMPT - 2 :] = False
    source = module.on_policy.source(module.student, batch, module.losses, 0, 6, 0)
    assert source.batch["mask"].any(1).tolist() == [True, False]
    assert int(source.figures["on_policy/at_limit"].count) == 1
    assert int(source.tokens) == PROMPT + int(source.batch["mask"].sum())


def test_a_short_block_gives_its_prompt_all_the_same(own: Any) -> None:
    """Rows of short documents may be shorter than prompt and sequence."""
    module, batch = own(), texts(0, 4)
    short = {key: value[:, : PROMPT + 1] for key, value in batch.items()}
    long, cut = (module.on_policy.source(module.student, b, module.losses, 0, 6, 0).batch for b in (batch, short))
    assert torch.equal(long["input_ids"], cut["input_ids"])
    assert torch.equal(long["mask"], cut["mask"])


def test_where_documents_are_kept_apart_the_last_one_is_gone_on_from(own: Any) -> None:
    module, batch = own(), texts(0, 6)
    batch["position_ids"] = torch.arange(LENGTH).expand(6, -1).clone()
    batch["position_ids"][2:4, 1:] -= 1  # a document of one token stands before
    source = module.on_policy.source(module.student, batch, module.losses, 0, 6, 0)
    short = batch["input_ids"][2:4, 1:PROMPT]
    alone, _ = sample(module.student, short, whole(short), None, uniform(2, 2), spec(), ENDS, VOCABULARY)
    new = alone.shape[1] - (PROMPT - 1)
    ours = source.batch["input_ids"][2:4, PROMPT:][:, :new]
    wrote, _ = until_end(ours, ENDS)
    assert torch.equal(ours[wrote], alone[:, PROMPT - 1 :][wrote])
    places = source.batch["position_ids"]
    assert places.shape == source.batch["input_ids"].shape
    assert places[0].tolist() == list(range(places.shape[1]))
    assert places[2].tolist() == [0, *range(places.shape[1] - 1)]
    without = {key: value for key, value in batch.items() if key != "position_ids"}
    mixed = module.on_policy.source(module.student, without, module.losses, 0, 6, 0).batch["input_ids"]
    assert not torch.equal(mixed[2:4, PROMPT:][:, :2], ours[:, :2])


def by_hand(module: DistillationModule, ids: Tensor, loss: str) -> dict[str, Tensor]:
    """Gradient of the mean divergence over what was written, the sequences taken as given."""
    student, teacher = module.student, module.teacher.model  # type: ignore[union-attr]
    wrote, _ = until_end(ids[:, PROMPT:], ENDS)
    assert teacher is not None
    q, p = (model(input_ids=ids).logits[:, PROMPT - 1 : -1][wrote].log_softmax(-1) for model in (student, teacher))
    p = p.detach()
    kl = {"forward_kl": lambda: functional.kl_div(q, p, log_target=True, reduction="batchmean")}
    kl["reverse_kl"] = lambda: functional.kl_div(p, q, log_target=True, reduction="batchmean")
    trained = {name: weight for name, weight in student.named_parameters() if weight.requires_grad}
    return dict(zip(trained, torch.autograd.grad(kl[loss](), list(trained.values())), strict=True))


@pytest.mark.parametrize(
    ("way", "micro", "loss"),
    [
        ("full", 8, ReverseKL()),
        ("full", 2, ReverseKL()),
        ("full", 1, ForwardKL()),
        ("lora", 4, ReverseKL()),
        ("quant lora head", 2, ForwardKL()),
    ],
)
def test_the_gradient_is_that_of_the_sequences_as_given(way: str, micro: int, loss: Any, own: Any) -> None:
    """For any split into micro-batches, though their sequences differ in length."""
    module, batch = own(way, [loss], attention_dropout=0.0), texts(0, 8)
    for part in module.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    for name, weight in module.student.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    expected = by_hand(module, written(module, batch)[0], loss.kind)
    found = one_step(module, batch, micro)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_bf16_mixed_learns_too(own: Any) -> None:
    """The weights that autocast cast for the sampling carry no gradient, and must not be met again."""
    exact = one_step(own(), texts(0, 8), 4)
    mixed = one_step(own(), texts(0, 8), 4, precision="bf16-mixed")
    assert mixed.keys() == exact.keys()
    assert all(mixed[name].any() for name in exact)


def test_gradient_checkpointing_changes_nothing(own: Any) -> None:
    plain, checkpointed = own(), own()
    checkpointed.student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    one, other = one_step(plain, texts(0, 4), 2), one_step(checkpointed, texts(0, 4), 2)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_share_1_learns_nothing_from_the_text(own: Any) -> None:
    """Other text after the same prompts is the same training."""
    batch, other = texts(0, 4), texts(0, 4)
    other["input_ids"][:, PROMPT:] = (other["input_ids"][:, PROMPT:] + 1) % VOCABULARY
    one, two = one_step(own(), batch, 4), one_step(own(), other, 4)
    assert all(torch.equal(one[name], two[name]) for name in one)
    other["input_ids"][:, 0] = (other["input_ids"][:, 0] + 1) % VOCABULARY
    three = one_step(own(), other, 4)
    assert not all(torch.equal(one[name], three[name]) for name in one)


def test_two_ranks_write_what_one_writes(own: Any) -> None:
    module, batch = own(), texts(0, 8)
    wrote: list[Tensor] = []
    draw = module.on_policy.source

    def keep(*arguments: Any) -> Any:
        result = draw(*arguments)
        wrote.extend(row[: PROMPT + NEW] for row in functional.pad(result.batch["input_ids"], (0, NEW)))
        return result

    module.on_policy.source = keep

    def step(world_size: int, rank: int, parts: list[slice]) -> list[list[int]]:
        trainer = SimpleNamespace(world_size=world_size, global_rank=rank, global_step=0)
        module.trainer = trainer
        module._step.sequences = 0
        wrote.clear()
        for part in parts:
            module._text_or_samples(module.on_policy, {key: value[part] for key, value in batch.items()}, module.losses)
        kept = [until_end(row[None, PROMPT:], ENDS)[0][0] for row in wrote]
        return [row[PROMPT:][on].tolist() for row, on in zip(wrote, kept, strict=True)]

    alone = step(1, 0, [slice(0, 8)])
    first = step(2, 0, [slice(0, 2), slice(4, 6)])
    second = step(2, 1, [slice(2, 4), slice(6, 8)])
    assert [*first[:2], *second[:2], *first[2:], *second[2:]] == alone
    assert len({tuple(row) for row in alone}) == 8


# ------------------------------------------------------------------------------------------------------- which steps


def test_seed_and_step_alone_decide_which_steps_are_own() -> None:
    def own_steps(share: Any, seed: int = 0) -> list[bool]:
        chosen = OnPolicy(spec(share=share), seed=seed, ends=ENDS, vocabulary=VOCABULARY)
        torch.rand(7)
        return [chosen.is_on_policy(step, 1000) for step in range(1000)]

    assert sum(own_steps(0.3)) == pytest.approx(300, abs=60)
    assert own_steps(0.3) == own_steps(0.3) != own_steps(0.3, seed=1)
    assert (sum(own_steps(0)), sum(own_steps(1))) == (0, 1000)
    rising = own_steps(Schedule(kind="linear", start=0, end=1))
    assert sum(rising[:200]) < 60 < 140 < sum(rising[800:])


def left_by(folder: Path) -> dict[str, Tensor]:
    return torch.load(checkpoint_path(folder / "checkpoints", 6), weights_only=True)["state_dict"]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_share_0_is_off_policy_to_the_last_bit(module: Any, train: Any, tmp_path: Path) -> None:
    for folder, chosen in (("never", policy(share=0.0)), ("off", None)):
        torch.manual_seed(3)
        made = module(attention_dropout=0.1)
        made.on_policy = chosen
        train(made, folder)
    assert same(left_by(tmp_path / "never"), left_by(tmp_path / "off"))
    rows = {folder: read_rows(tmp_path / folder) for folder in ("never", "off")}
    for ours, theirs in zip(rows["never"], rows["off"], strict=True):
        assert ours.pop("on_policy/generated_share", 0.0) == 0.0
        assert 0 < ours.pop("tokens") <= theirs.pop("tokens")  # these blocks are filled up
        assert {k: v for k, v in ours.items() if "/" not in k or k.startswith(("train/", "val/"))} == {
            k: v for k, v in theirs.items() if "/" not in k or k.startswith(("train/", "val/"))
        }


def pull() -> None:
    raise KeyError("stands for a kill")


def test_a_kill_changes_no_bit(own: Any, train: Any, tmp_path: Path) -> None:
    """Killed at step 4 of 6, checkpoint at 3, rows at every second step; with dropout and a schedule of the share."""
    share = Schedule(kind="linear", start=0.2, end=1.0)

    def made() -> DistillationModule:
        torch.manual_seed(3)
        losses: list[LossSpec] = [JensenShannon(beta=0.5), CrossEntropy(weight=0.1)]
        return own(losses=losses, share=share, attention_dropout=0.1)

    train(made(), "straight")
    with pytest.raises(KeyError):
        train(made(), "resumed", at={16: pull})
    torch.manual_seed(4)
    train(made(), "resumed")
    assert same(left_by(tmp_path / "resumed"), left_by(tmp_path / "straight"))
    rows = [
        [{k: v for k, v in row.items() if not k.startswith(("perf/", "memory/"))} for row in read_rows(tmp_path / name)]
        for name in ("resumed", "straight")
    ]
    assert rows[0] == rows[1]
    shares = [row["on_policy/generated_share"] for row in rows[0] if "lr" in row]
    assert max(shares) > 0
    # the budget of 6 steps of 4 blocks is an upper bound: samples are shorter
    assert 0 < rows[0][-1]["tokens"] < 6 * 4 * LENGTH


def test_validation_is_of_the_text(own: Any, module: Any) -> None:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    means = []
    for made in (own(), module()):
        pl.Trainer(accelerator="cpu", **quiet).validate(made, DataLoader([texts(0, 4)], batch_size=None), verbose=False)  # type: ignore[arg-type]
        means.append(made.validation_means())
    assert means[0] == means[1]


# ------------------------------------------------------------------------------------------------------------- alarms


def test_repetition_counts_what_stood_before_in_the_same_row() -> None:
    tokens = torch.tensor([[1, 2, 3, 4, 1, 2, 3, 4, 1], [1, 2, 3, 4, 5, 6, 7, 8, 9], [1] * 9])
    counted = torch.ones_like(tokens, dtype=torch.bool)
    counted[2, 6:] = False
    for row, (again, total) in enumerate([(2, 6), (0, 6), (2, 3)]):
        term = repetition(tokens[row : row + 1], counted[row : row + 1])
        assert (float(term.sum), int(term.count)) == (again, total)
    large = tokens * 200_000  # n-grams that no longer fit 64 bits
    assert float(repetition(large, counted).sum) == 4
    assert int(repetition(tokens[:, :3], counted[:, :3]).count) == 0


def degenerate(module: DistillationModule) -> DistillationModule:
    """A student that writes one token for ever, sure of it."""
    with torch.no_grad():
        for name, weight in module.student.named_parameters():
            if name.endswith("norm.weight"):
                weight.zero_()  # hidden states of 0: every logit is 0
    head = module.student.lm_head
    head.register_forward_hook(lambda _, __, out: out + 50.0 * (torch.arange(VOCABULARY) == 9))
    return module


LONG = {"prompt_tokens": 1, "max_new_tokens": 7}


def test_a_degenerate_student_is_warned_of_in_a_line(own: Any, train: Any, tmp_path: Path) -> None:
    said = train(degenerate(own(**LONG, alarms={"at_limit": 0.05})))
    (line,) = [line for line in said if "warning" in line]
    assert line.startswith(
        "  warning: distill step 2: on-policy samples reach max_new_tokens (7) without an end (100%, the text"
    )
    assert "repeat their own 4-grams (75%, the text 0%) and are nearly certain (entropy 0.000 nats" in line
    row = next(row for row in read_rows(tmp_path / "stage") if "lr" in row)
    wanted = {
        "entropy",
        "length",
        "at_limit",
        "text_at_limit",
        "repetition",
        "text_repetition",
        "generated_share",
        "kl",
    }
    assert {f"on_policy/{name}" for name in wanted} == {name for name in row if name.startswith("on_policy/")}


def test_a_degenerate_student_is_stopped_when_the_recipe_says_so(own: Any, train: Any, tmp_path: Path) -> None:
    with pytest.raises(DistillError, match=r"2 rows of metrics in a row; lower on_policy.share") as raised:
        train(degenerate(own(**LONG, on_alarm="stop", num_alarms=2)))
    assert raised.value.exit_code == 1
    assert "\n" not in str(raised.value)
    assert [row["step"] for row in read_rows(tmp_path / "stage") if "lr" in row] == [2, 4]


def test_a_sound_student_and_alarms_that_are_off_are_quiet(own: Any, train: Any) -> None:
    assert train(own()) == []
    off = {"at_limit": None, "repetition": None, "min_entropy": None}
    assert train(degenerate(own(**LONG, alarms=off, on_alarm="stop", num_alarms=1)), "off") == []


def test_alarms_look_at_rows_in_a_row_and_past_those_without_samples() -> None:
    good = {
        "length": 5.0,
        "entropy": 1.0,
        "at_limit": 0.9,
        "text_at_limit": 0.8,
        "repetition": 0.4,
        "text_repetition": 0.2,
    }
    bad = good | {"entropy": 0.01}
    said: list[str] = []
    alarms = Alarms(spec(on_alarm="stop", num_alarms=2), "distill", said.append)
    for step, figures in enumerate((bad, good, bad, {}, bad | {"length": 0.0})):
        alarms.look({f"on_policy/{name}": value for name, value in figures.items()}, step)
    assert len(said) == 2
    with pytest.raises(DistillError, match="distill step 9: on-policy samples are nearly certain"):
        alarms.look({f"on_policy/{name}": value for name, value in bad.items()}, 9)


# ----------------------------------------------------------------------------------------------------------- refusals


def test_student_and_teacher_must_end_a_text_alike() -> None:
    assert agreed_ends([7, 3], [3, 7], 3) == (3, 7)
    assert agreed_ends(3, [3]) == (3,)
    with pytest.raises(
        InputError, match=r"the student ends a text with token 3, the teacher with 3 or 7, so .* give both"
    ):
        agreed_ends(3, [7, 3])
    with pytest.raises(InputError, match=r"both models end a text with token \(none\), the run's tokenizer with 0"):
        agreed_ends(None, None, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"on_policy": {"share": 1.5}}, "less than or equal to 1"),
        ({"on_policy": {"temperature": 0}}, "greater than 0"),
        ({"on_policy": {"share": 1}, "losses": ["reverse_kl", "cross_entropy"]}, "cross_entropy needs the text's next"),
        ({"on_policy": {}, "losses": ["decoupled_kd"]}, "decoupled_kd needs the text's next token.*add a loss such as"),
        ({"on_policy": {}, "losses": ["decoupled_kd", "hidden_mse"]}, "decoupled_kd needs .*add a loss such as"),
    ],
)
def test_settings_that_cannot_work(settings: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DistillSpec.model_validate({"num_steps": 1} | settings)


def test_shards_are_refused_by_name() -> None:
    asked: Any = SimpleNamespace(trainer=SimpleNamespace(strategy=Sharded(2)), on_policy=object())
    with pytest.raises(InputError, match=r"compute.strategy: fsdp cannot sample .* \(on_policy\); use ddp"):
        DistillationModule.configure_model(asked)


def test_a_teacher_that_does_not_run_is_refused(llama: Any, tmp_path: Path) -> None:
    from distill.training.cached_teacher import CachedTeacher

    cached = CachedTeacher(VOCABULARY, tmp_path / "head.safetensors", whole=True)
    for teacher in (cached, None):
        losses: list[LossSpec] = [CrossEntropy()] if teacher is None else [ForwardKL()]
        with pytest.raises(InputError, match="on_policy needs a teacher in memory"):
            DistillationModule(llama(), losses, teacher, on_policy=policy())


def test_a_module_without_a_loss_for_samples_is_refused(llama: Any) -> None:
    with pytest.raises(InputError, match="on_policy needs a loss that does without the text's next token"):
        DistillationModule(llama(), [CrossEntropy()], llama(1), on_policy=policy())
