"""What each divergence promises in its file, beyond the contract that all of them keep."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional

from distill.losses import (
    DecoupledKD,
    adaptive_kl,
    decoupled_kd,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    skewed_forward_kl,
    skewed_reverse_kl,
    standardized_kl,
    total_variation,
)
from distill.losses.adaptive_kl import head_share

VOCABULARY, TOKENS = 17, 32
ON = torch.ones(TOKENS, dtype=torch.bool)


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    """Student's and teacher's logits."""
    random = torch.Generator().manual_seed(3)
    return torch.randn(TOKENS, VOCABULARY, generator=random), 2 * torch.randn(TOKENS, VOCABULARY, generator=random)


@pytest.fixture
def opposed() -> tuple[Tensor, Tensor]:
    """Two models that are sure of different tokens, further than fp32 can tell from impossible."""
    student, teacher = torch.zeros(TOKENS, VOCABULARY), torch.zeros(TOKENS, VOCABULARY)
    student[:, 0], teacher[:, 1] = 400.0, 400.0
    return student, teacher


def gradient(loss: Any, student: Tensor, *rest: Any, **settings: Any) -> Tensor:
    student = student.clone().requires_grad_()
    loss(student, *rest, **settings).sum.backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    return student.grad


@pytest.mark.parametrize(
    ("limit", "beta", "size"), [(forward_kl, 1e-4, lambda b: b), (reverse_kl, 1 - 1e-4, lambda b: 1 - b)]
)
def test_jensen_shannon_becomes_the_kls_at_its_ends(
    limit: Any, beta: float, size: Any, pair: tuple[Tensor, Tensor]
) -> None:
    found, expected = jensen_shannon(*pair, ON, beta=beta), limit(*pair, ON)
    assert found.sum.item() / size(beta) == pytest.approx(expected.sum.item(), rel=0.02)
    ours, theirs = gradient(jensen_shannon, *pair, ON, beta=beta) / size(beta), gradient(limit, *pair, ON)
    assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_jensen_shannon_at_a_half_is_symmetric_and_bounded(
    pair: tuple[Tensor, Tensor], opposed: tuple[Tensor, Tensor]
) -> None:
    student, teacher = pair
    torch.testing.assert_close(jensen_shannon(student, teacher, ON).sum, jensen_shannon(teacher, student, ON).sum)
    assert jensen_shannon(*opposed, ON).per_token().item() == pytest.approx(math.log(2))
    for beta in (0.1, 0.7):
        coin = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
        assert jensen_shannon(*opposed, ON, beta=beta).per_token().item() == pytest.approx(coin)


@pytest.mark.parametrize(
    ("skewed", "plain"), [(skewed_forward_kl, forward_kl), (skewed_reverse_kl, reverse_kl)], ids=["forward", "reverse"]
)
def test_skew_bounds_what_the_plain_kl_lets_grow(
    skewed: Any, plain: Any, pair: tuple[Tensor, Tensor], opposed: tuple[Tensor, Tensor]
) -> None:
    assert plain(*opposed, ON).per_token() > 300
    for alpha in (0.1, 0.5):
        assert skewed(*opposed, ON, alpha=alpha).per_token().item() == pytest.approx(math.log(1 / alpha))
    assert skewed(*pair, ON, alpha=1e-6).sum.item() == pytest.approx(plain(*pair, ON).sum.item(), rel=1e-3)
    assert skewed(*pair, ON, alpha=0.999).sum.item() == pytest.approx(0, abs=1e-3)


def test_skewed_reverse_is_skewed_forward_with_the_models_exchanged(pair: tuple[Tensor, Tensor]) -> None:
    student, teacher = pair
    torch.testing.assert_close(
        skewed_reverse_kl(student, teacher, ON, alpha=0.3).sum, skewed_forward_kl(teacher, student, ON, alpha=0.3).sum
    )


@pytest.mark.parametrize(
    ("mu", "head"),
    [(0.01, 1), (0.39, 1), (0.41, 2), (0.69, 2), (0.71, 3), (0.99, 4)],
)
def test_the_head_is_the_fewest_tokens_that_hold_mu(mu: float, head: int) -> None:
    p, q = torch.tensor([0.1, 0.4, 0.2, 0.3]), torch.tensor([0.4, 0.3, 0.1, 0.2])
    order = [1, 3, 2, 0]
    gap = (p - q).abs()
    expected = gap[order[:head]].sum() / gap.sum()
    torch.testing.assert_close(head_share(p, gap, mu), expected)


def test_tokens_as_likely_as_the_last_of_the_head_belong_to_it() -> None:
    p, gap = torch.tensor([0.3, 0.3, 0.3, 0.1]), torch.tensor([1.0, 2.0, 4.0, 8.0])
    for order in ([0, 1, 2, 3], [3, 2, 0, 1]):
        torch.testing.assert_close(head_share(p[order], gap[order], 0.5), torch.tensor(7 / 15))


def test_adaptive_kl_mixes_both_kls_token_by_token_and_gives_its_weights_no_gradient(
    pair: tuple[Tensor, Tensor],
) -> None:
    student, teacher = pair
    p, q = teacher.softmax(-1), student.softmax(-1)
    w = head_share(p, (q - p).abs(), 0.5)
    assert 0 < w.min() < w.max() <= 1
    terms = []
    for t in range(TOKENS):
        one = torch.zeros_like(ON)
        one[t] = True
        terms.append(w[t] * gradient(forward_kl, *pair, one) + (1 - w[t]) * gradient(reverse_kl, *pair, one))
    torch.testing.assert_close(gradient(adaptive_kl, *pair, ON), torch.stack(terms).sum(0))


def test_total_variation_is_a_distance_between_0_and_1(
    pair: tuple[Tensor, Tensor], opposed: tuple[Tensor, Tensor]
) -> None:
    student, teacher = pair
    assert total_variation(*opposed, ON).per_token() == 1
    assert total_variation(student, student, ON).sum == 0
    torch.testing.assert_close(total_variation(student, teacher, ON).sum, total_variation(teacher, student, ON).sum)
    accepted = torch.minimum(student.softmax(-1), teacher.softmax(-1)).sum(-1)
    torch.testing.assert_close(total_variation(*pair, ON).sum, (1 - accepted).sum())


def test_total_variation_has_its_kink_at_agreement_only(pair: tuple[Tensor, Tensor]) -> None:
    _, teacher = pair
    near = teacher + 1e-3 * torch.randn(teacher.shape, generator=torch.Generator().manual_seed(1))
    assert gradient(total_variation, near, teacher, ON).norm(dim=-1).mean() > 0.01
    assert gradient(forward_kl, near, teacher, ON).norm(dim=-1).mean() < 0.001
    assert not gradient(total_variation, teacher, teacher, ON).any()


def test_standardised_logits_have_no_scale(pair: tuple[Tensor, Tensor]) -> None:
    student, teacher = pair
    expected = standardized_kl(student, teacher, ON, temperature=0.5).sum
    for scaled in ((7 * student + 3, teacher), (student, 0.1 * teacher - 5)):
        torch.testing.assert_close(standardized_kl(*scaled, ON, temperature=0.5).sum, expected, rtol=1e-4, atol=1e-4)
    assert standardized_kl(3 * teacher, teacher, ON).sum.abs() < 1e-4
    along = (gradient(standardized_kl, student, teacher, ON) * student).sum(-1)  # scaling the logits changes nothing
    assert along.abs().max() < 1e-5


def test_standardised_logits_of_a_new_head_are_finite(pair: tuple[Tensor, Tensor]) -> None:
    _, teacher = pair
    for student in (torch.zeros_like(teacher), torch.full_like(teacher, 8.0)):
        assert gradient(standardized_kl, student, teacher, ON).any()
        assert standardized_kl(teacher, student, ON).sum.isfinite()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_decoupled_kd_is_forward_kl_when_the_rest_is_weighted_by_its_mass(
    temperature: float, pair: tuple[Tensor, Tensor]
) -> None:
    student, teacher = pair
    targets = torch.arange(TOKENS) % VOCABULARY
    p_target = (teacher / temperature).softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    for t in range(TOKENS):
        one = torch.zeros_like(ON)
        one[t] = True
        settings = {"alpha": 1.0, "beta": 1 - p_target[t].item(), "temperature": temperature}
        found = decoupled_kd(student, teacher, targets, one, **settings)
        torch.testing.assert_close(found.sum, forward_kl(student, teacher, one, temperature=temperature).sum)


def test_decoupled_kd_sees_the_others_behind_a_sure_teacher() -> None:
    """Where 1 - p(target) is 0 in fp32, forward KL has lost the other tokens; their shares are still exact here."""
    targets = torch.zeros(TOKENS, dtype=torch.int64)
    random = torch.Generator().manual_seed(5)
    student, teacher = (torch.randn(TOKENS, VOCABULARY, generator=random) for _ in range(2))
    expected = functional.kl_div(
        student[:, 1:].log_softmax(-1), teacher[:, 1:].log_softmax(-1), reduction="sum", log_target=True
    )
    for model in (student, teacher):
        model[:, 0] = 300.0
    assert forward_kl(student, teacher, ON).sum.abs() < 1e-5
    found = decoupled_kd(student, teacher, targets, ON)
    assert found.sum.item() == pytest.approx(expected.item(), rel=1e-5)
    assert gradient(decoupled_kd, student, teacher, targets, ON)[:, 1:].any(-1).all()


def test_decoupled_kd_of_nothing_is_refused() -> None:
    with pytest.raises(ValidationError, match="the loss is always 0"):
        DecoupledKD(alpha=0, beta=0)
