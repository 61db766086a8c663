"""Codecs against the distribution that they were given."""

from __future__ import annotations

from math import lgamma, log
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from distill.data.teacher_cache import Hidden, Sampled, TopK
from distill.data.teacher_cache.base import HIDDEN, IDS, PROBS, TAIL, CodecSpec
from distill.data.teacher_cache.sorted_ids import num_bytes, pack_sorted, unpack_sorted
from distill.losses import CrossEntropy, ForwardKL, ReverseKL
from distill.losses.head_losses import KL, Head, head_losses
from distill.losses.sparse import SparseSignal, refusal

from .caches import (
    VOCABULARY,
    WIDTH,
    coded,
    logits_of,
    sparse,
    value_and_gradient,
)


@pytest.mark.parametrize("universe", [40, 4096, 16 * 128_256, 1 << 30])
@pytest.mark.parametrize("share", ["one", "few", "all"])
def test_rising_numbers_come_back_from_nearly_the_fewest_bits(universe: int, share: str) -> None:
    count = {"one": 1, "few": min(universe, 1024) // 2, "all": min(universe, 1024)}[share]
    if share == "one" and universe > 1 << 24:
        pytest.skip("more than 2**24 times the count")
    random = np.random.default_rng(universe)
    some = np.unique(random.integers(0, universe, count)) if universe > 4096 else np.arange(count)
    for values in (some, some + (universe - 1 - some[-1])):  # the lowest and the highest that there can be
        data = pack_sorted(values, universe)
        assert len(data) == num_bytes(len(values), universe)
        assert np.array_equal(unpack_sorted(np.append(data, np.uint8(255)), len(values), universe), values)
        fewest = (lgamma(universe + 1) - lgamma(len(values) + 1) - lgamma(universe - len(values) + 1)) / log(2)
        assert 8 * len(data) <= fewest + 2.1 * len(values) + 24


def test_numbers_of_few_bits_are_near_what_any_code_needs() -> None:
    values = np.sort(np.random.default_rng(0).choice(128_256, 64, replace=False))
    bits = 8 * len(pack_sorted(values, 128_256)) / 64
    assert bits < 13.3  # log2 of 128,256 over 64 is 12.4 a number; three bytes would be 24


def test_top_k_of_everything_is_exact() -> None:
    student, teacher = logits_of(6, seed=1), logits_of(6)
    value, gradient = value_and_gradient(student, sparse(TopK(k=VOCABULARY, value_dtype="float32"), teacher))
    expected, whole = value_and_gradient(student, teacher)
    assert value == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(gradient, whole, atol=1e-6, rtol=1e-5)


def test_top_k_is_the_kl_of_k_plus_one_outcomes() -> None:
    student, teacher = logits_of(6, seed=1), logits_of(6)
    value, _ = value_and_gradient(student, sparse(TopK(k=5, value_dtype="float32"), teacher))
    p, q = (x.double().softmax(-1).numpy() for x in (teacher, student))
    expected = 0.0
    for of_p, of_q in zip(p, q, strict=True):
        kept = np.argsort(-of_p)[:5]
        a, b = (np.append(x[kept], 1 - x[kept].sum()) for x in (of_p, of_q))
        expected += (a * np.log(a / b)).sum()
    assert value == pytest.approx(expected, rel=1e-5)
    assert value < value_and_gradient(student, teacher)[0]  # data processing


def test_top_k_gradient_against_finite_differences() -> None:
    signal = sparse(TopK(k=3, value_dtype="float32"), logits_of(2, 7))
    student = logits_of(2, 7, seed=1)
    _, gradient = value_and_gradient(student, signal)
    for row, column in ((0, 0), (0, 6), (1, 3)):
        step = torch.zeros_like(student)
        step[row, column] = 1e-2
        up, down = (value_and_gradient(student + sign * step, signal)[0] for sign in (1, -1))
        assert float(gradient[row, column]) == pytest.approx((up - down) / 2e-2, abs=2e-3)


@pytest.mark.parametrize("value_dtype", ["float16", "bfloat16"])
def test_top_k_keeps_a_sum_of_one_and_is_zero_at_the_teacher(value_dtype: Any) -> None:
    teacher = logits_of(50)
    _, decoded = coded(TopK(k=8, value_dtype=value_dtype), teacher.log_softmax(-1))
    torch.testing.assert_close(decoded[PROBS].sum(-1) + decoded[TAIL], torch.ones(50))
    value, gradient = value_and_gradient(teacher, sparse(TopK(k=8, value_dtype=value_dtype), teacher))
    assert 0 <= value / 50 < 1e-4
    assert gradient.abs().max() < 0.02


def test_tail_keeps_its_digits_when_the_student_is_sure() -> None:
    logits = torch.zeros(1, 1000)
    logits[0, 0] = 40.0  # 1 - q is below the resolution of fp32
    value, gradient = value_and_gradient(logits, sparse(TopK(k=1, value_dtype="float32"), logits))
    assert value == pytest.approx(0.0, abs=1e-6)
    assert torch.isfinite(gradient).all()


def test_sampled_is_right_on_average() -> None:
    student, teacher = logits_of(3, seed=1), logits_of(3)
    expected, whole = value_and_gradient(student, teacher)
    rounds = 10_000
    value, gradients = value_and_gradient(
        student.repeat(rounds, 1), sparse(Sampled(draws=10), teacher.repeat(rounds, 1))
    )
    error = (gradients.unflatten(0, (rounds, 3)).mean(0) - whole).abs()
    p = teacher.softmax(-1)
    one_draw = 1 / (10 * rounds)  # a rare token is drawn never or once, far from normally distributed
    assert bool((error <= 5 * (p * (1 - p) * one_draw).sqrt() + 3 * one_draw).all())
    log_q = student.log_softmax(-1)
    variance = ((p * log_q**2).sum(-1) - (p * log_q).sum(-1) ** 2).sum() * one_draw
    assert abs(value / rounds - expected) < 4 * float(variance.sqrt()) + 3e-3  # the entropy is stored in fp16


def test_sampled_counts_its_draws_and_is_small() -> None:
    data, decoded = coded(Sampled(draws=50), logits_of(200).log_softmax(-1))
    torch.testing.assert_close(decoded[PROBS].sum(-1), torch.ones(200))
    kept = decoded[PROBS] > 0
    ids = num_bytes(int(kept.sum()), 200 * VOCABULARY)
    assert len(data) == 2 * 200 + 200 * 50 // 8 + ids
    assert ids < int(kept.sum())
    for ids, on in zip(decoded[IDS], kept, strict=True):
        assert len(set(ids[on].tolist())) == int(on.sum())


def test_hidden_is_exact_to_bf16() -> None:
    hidden = torch.randn(9, WIDTH)
    data, decoded = coded(Hidden(), hidden)
    assert len(data) == 9 * WIDTH * 2
    assert torch.equal(decoded[HIDDEN], hidden.bfloat16())


@pytest.mark.parametrize("codec", [TopK(k=50), Sampled()])
def test_wider_teacher_is_compared_over_the_shared_tokens(codec: CodecSpec) -> None:
    teacher = logits_of(4, VOCABULARY + 8)
    teacher[:, VOCABULARY:] = -30.0  # padding
    student = logits_of(4, seed=1)
    value, gradient = value_and_gradient(student, sparse(codec, teacher))
    if codec.kind == "top_k":
        expected, whole = value_and_gradient(student, teacher)
        assert value == pytest.approx(expected, rel=1e-2)
        torch.testing.assert_close(gradient, whole, atol=1e-2, rtol=0)
    wider = torch.cat([student, torch.full((4, 20), 5.0)], -1)
    assert value_and_gradient(wider, sparse(codec, teacher[:, :VOCABULARY]))[0] == pytest.approx(
        value_and_gradient(student, sparse(codec, teacher[:, :VOCABULARY]))[0], rel=1e-5
    )


def test_losses_that_need_more_are_refused_by_name() -> None:
    assert refusal([ForwardKL(), CrossEntropy()]) is None
    assert "reverse_kl needs" in str(refusal([ForwardKL(), ReverseKL()]))
    assert "temperature 2.0" in str(refusal([ForwardKL(temperature=2.0)]))


@pytest.mark.parametrize("codec", [TopK(k=6), Sampled()])
def test_chunks_and_masks_change_nothing(codec: CodecSpec) -> None:
    head, hidden = nn.Linear(WIDTH, VOCABULARY), torch.randn(2, 12, WIDTH)
    signal = sparse(codec, logits_of(24))
    signal = SparseSignal(
        *(x.unflatten(0, (2, 12)) for x in (signal.ids, signal.probs)),
        VOCABULARY,
        *(None if x is None else x.unflatten(0, (2, 12)) for x in (signal.tail, signal.entropy)),
    )
    mask, targets = torch.rand(2, 12) < 0.6, torch.zeros(2, 12, dtype=torch.int64)
    losses = [("forward_kl", ForwardKL()), ("cross_entropy", CrossEntropy(weight=0.5))]
    results = []
    for chunk in (5, 512):
        hidden = hidden.detach().requires_grad_()
        total, terms = head_losses(
            hidden, Head(head, tuple(head.parameters())), signal, targets, mask, losses, chunk_tokens=chunk
        )
        assert terms[KL].sum == pytest.approx(float(terms["forward_kl"].sum), rel=1e-5)
        results.append((total.detach(), torch.autograd.grad(total, hidden)[0]))
    torch.testing.assert_close(results[0], results[1])
    assert float(results[0][1][~mask].abs().max()) == 0.0
    total, _ = head_losses(hidden, Head(head), signal, targets, torch.zeros_like(mask), losses)
    total.backward()
    assert float(total.detach()) == 0.0


@pytest.mark.parametrize("vocabulary", [VOCABULARY, VOCABULARY + 8])
@pytest.mark.parametrize("codec", [TopK(k=6), TopK(k=99, value_dtype="float32"), Sampled()], ids=str)
def test_the_chunked_gradient_is_that_of_the_loss(codec: CodecSpec, vocabulary: int) -> None:
    student = torch.cat([logits_of(20, seed=1), 30 * logits_of(20, seed=2)])  # some of them sure of a token
    teacher = logits_of(40, vocabulary)
    teacher[:, VOCABULARY:] -= 3  # some of a padded head's mass is where the student has no token
    few = sparse(codec, teacher)
    expected, gradient = value_and_gradient(student.double(), few)
    eye = torch.eye(VOCABULARY)
    hidden = student.unsqueeze(0).requires_grad_()
    batch = SparseSignal(
        *(x.unsqueeze(0) for x in (few.ids, few.probs)),
        vocabulary,
        *(None if x is None else x.unsqueeze(0) for x in (few.tail, few.entropy)),
    )
    on, targets = torch.ones(1, 40, dtype=torch.bool), torch.zeros(1, 40, dtype=torch.int64)
    losses = [("forward_kl", ForwardKL())]
    total, _ = head_losses(hidden, Head(lambda rows: rows @ eye), batch, targets, on, losses, chunk_tokens=16)
    total.backward()
    assert float(total.detach()) == pytest.approx(expected, rel=1e-5)
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad[0], gradient.float(), rtol=1e-4, atol=1e-5)
