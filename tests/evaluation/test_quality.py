"""Quality against a slow float64 computation, token by token."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torchmetrics.text import Perplexity

from distill.core.batch import causal_batch
from distill.core.errors import InputError
from distill.evaluation.quality import measure_quality


class Rows(nn.Module):
    """An output head that looks logits up."""

    def __init__(self, rows: torch.Tensor):
        super().__init__()
        self.rows, self.most_tokens = nn.Parameter(rows), 0

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.most_tokens = max(self.most_tokens, hidden[..., 0].numel())
        return self.rows[hidden[..., 0]]


class Table(nn.Module):
    """A bigram model: the logits of the next token are a row of a table."""

    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=4))
    device = torch.device("cpu")

    def __init__(self, known: int, width: int | None = None, seed: int = 0, scale: float = 3.0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.head = Rows(scale * torch.randn(known, width or known, generator=generator))

    @property
    def rows(self) -> torch.Tensor:
        return self.head.rows

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def base_model(self, input_ids: torch.Tensor, use_cache: bool = True) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=input_ids.unsqueeze(-1))

    def forward(self, input_ids: torch.Tensor, use_cache: bool = True) -> SimpleNamespace:
        return SimpleNamespace(logits=self.rows[input_ids])


class Doubled(Table):
    """Has an operation behind its head, so that only its forward knows its logits."""

    def forward(self, input_ids: torch.Tensor, use_cache: bool = True) -> SimpleNamespace:
        return SimpleNamespace(logits=2 * self.rows[input_ids])


def batches(sizes: list[tuple[int, int]], vocabulary: int = 11, seed: int = 1) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number, (rows, length) in enumerate(sizes):
        mask = torch.rand(rows, length, generator=generator) < (0.2 if number % 2 else 0.9)
        mask[:, -1] = False
        ids = torch.randint(vocabulary, (rows, length), generator=generator)
        made.append(causal_batch(ids, mask))
    return made


def naive(student: Table, teacher: Table, data: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """Plain Python over float64 probabilities."""
    loss = kl = agree = 0.0
    count = 0
    for batch in data:
        for ids, mask in zip(batch["input_ids"].tolist(), batch["mask"].tolist(), strict=True):
            for t in range(len(ids) - 1):
                if not mask[t]:
                    continue
                own, other = (m.rows[ids[t]].double().tolist() for m in (student, teacher))
                count += 1
                loss -= own[ids[t + 1]] - math.log(sum(map(math.exp, own)))
                width = min(len(own), len(other))
                p, q = ([math.exp(v) for v in values[:width]] for values in (other, own))
                p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
                kl += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
                agree += p.index(max(p)) == q.index(max(q))
    return {"loss": loss / count, "kl": kl / count, "agree": agree / count, "count": count, "total": loss}


@pytest.mark.parametrize(("student_width", "teacher_width"), [(11, 11), (16, 11), (11, 16), (13, 16)])
def test_against_float64_with_uneven_masks_and_widths(student_width: int, teacher_width: int) -> None:
    student, teacher = Table(11, student_width), Table(11, teacher_width, seed=5)
    data = batches([(3, 9), (1, 30), (2, 4)])
    found, expected = measure_quality(student, teacher, data, 200, chunk_tokens=7), naive(student, teacher, data)
    assert found.tokens == expected["count"]
    assert found.loss_nats == pytest.approx(expected["loss"], rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(expected["loss"]), rel=1e-6)
    assert found.kl_to_teacher == pytest.approx(expected["kl"], rel=1e-5)
    assert found.top1_agreement == pytest.approx(expected["agree"], abs=1e-12)
    assert found.bits_per_byte == pytest.approx(expected["total"] / math.log(2) / 200, rel=1e-6)


def test_no_more_logits_exist_at_once_than_a_chunk_of_tokens() -> None:
    student, teacher = Table(11), Table(11, seed=5)
    assert measure_quality(student, teacher, batches([(3, 90)]), chunk_tokens=7).tokens > 70
    assert (student.head.most_tokens, teacher.head.most_tokens) == (7, 7)


def test_a_model_without_a_head_of_its_own_is_asked_row_by_row() -> None:
    data, plain, doubled = batches([(3, 9), (2, 7)]), Table(11), Doubled(11)
    with torch.no_grad():
        plain.rows.mul_(2)
    found, expected = (measure_quality(model, Table(11, seed=5), data, chunk_tokens=5) for model in (doubled, plain))
    assert (found.loss_nats, found.kl_to_teacher) == pytest.approx((expected.loss_nats, expected.kl_to_teacher))


def test_agrees_with_torchmetrics_where_that_is_exact() -> None:
    student, data = Table(11), batches([(3, 9), (2, 4)])
    metric = Perplexity(ignore_index=-100)
    for batch in data:
        targets = batch["input_ids"].roll(-1, 1).masked_fill(~batch["mask"], -100)
        metric.update(student(batch["input_ids"]).logits.detach(), targets)
    assert measure_quality(student, None, data).perplexity == pytest.approx(float(metric.compute()), rel=1e-5)


def test_unlikely_tokens_do_not_underflow() -> None:
    student = Table(11, scale=400.0)
    found = measure_quality(student, None, batches([(2, 20)]))
    assert math.isfinite(found.loss_nats)
    assert found.loss_nats > 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_its_own_perfect_teacher(dtype: torch.dtype) -> None:
    model = Table(11).to(dtype)
    found = measure_quality(model, model, batches([(3, 9)]))
    assert found.kl_to_teacher == 0.0
    assert found.top1_agreement == 1.0


def test_tokens_that_the_teacher_rules_out() -> None:
    student, teacher = Table(11), Table(11, seed=3)
    with torch.no_grad():
        for model in (student, teacher):
            model.rows[:, 10] = -torch.inf
    assert math.isfinite(measure_quality(student, teacher, batches([(2, 9)], vocabulary=10)).kl_to_teacher or math.nan)


def test_splitting_into_batches_changes_nothing() -> None:
    student, teacher, (batch,) = Table(11), Table(11, seed=2), batches([(8, 6)])
    halves = [{key: value[part] for key, value in batch.items()} for part in (slice(0, 3), slice(3, 8))]
    whole, split = measure_quality(student, teacher, [batch]), measure_quality(student, teacher, halves)
    assert split.loss_nats == pytest.approx(whole.loss_nats, rel=1e-12)
    assert split.kl_to_teacher == pytest.approx(whole.kl_to_teacher, rel=1e-6)


def test_without_teacher_and_modes_restored() -> None:
    model = Table(11).train()
    found = measure_quality(model, None, batches([(2, 5)]))
    assert found.kl_to_teacher is None
    assert found.top1_agreement is None
    assert found.bits_per_byte is None
    assert model.training
    assert model.rows.grad is None


def test_mistakes_are_named() -> None:
    empty = causal_batch(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.bool))
    with pytest.raises(InputError, match="no token is counted"):
        measure_quality(Table(11), None, [empty])
    with pytest.raises(InputError, match="outside the model's vocabulary of 8"):
        measure_quality(Table(11, 8), None, batches([(4, 20)]))
    with pytest.raises(InputError, match="validation_bytes"):
        measure_quality(Table(11), None, batches([(1, 4)]), 0)
