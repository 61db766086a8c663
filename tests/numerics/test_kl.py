"""KL divergence in each of its forms, against float64 and autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distill.numerics.kl import kl, kl_and_gradient_, kl_of_logits, kl_summands

TOKENS, VOCABULARY = 13, 37


@pytest.fixture(params=[0.1, 3.0, 30.0])
def logits(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor]:
    """Of p and of q, from nearly even to nearly certain."""
    random = torch.Generator().manual_seed(2)
    p, q = (request.param * torch.randn(TOKENS, VOCABULARY, generator=random) for _ in range(2))
    return p, q


def reference(p: Tensor, q: Tensor) -> Tensor:
    p, q = p.double().softmax(-1), q.double().softmax(-1)
    return torch.stack([(a * (a / b).log()).nan_to_num(0.0).sum() for a, b in zip(p, q, strict=True)])


def test_every_form_is_the_definition(logits: tuple[Tensor, Tensor]) -> None:
    p, q = logits
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    out = torch.empty_like(p)
    forms = [
        kl(log_p, log_q),
        kl(log_p, log_q, log_p.exp()),
        kl(log_p, log_q, out=out),
        kl_summands(log_p, log_q).sum(-1),
        kl_of_logits(p, q),
        kl_and_gradient_(p.clone(), q.clone(), torch.empty_like(p)),
    ]
    for value in forms:
        assert value.shape == (TOKENS,)
        torch.testing.assert_close(value.double(), reference(p, q), rtol=1e-5, atol=1e-6)
    assert torch.equal(out, kl_summands(log_p, log_q))  # where it says that they are


def test_the_gradient_in_place_is_that_of_autograd(logits: tuple[Tensor, Tensor]) -> None:
    p, q = logits
    leaf = q.double().requires_grad_()
    kl(p.double().log_softmax(-1), leaf.log_softmax(-1)).sum().backward()
    gradient = q.clone()
    kl_and_gradient_(p.clone(), gradient, torch.full_like(p, float("nan")))
    torch.testing.assert_close(gradient.double(), leaf.grad, rtol=1e-4, atol=1e-6)


def test_measuring_leaves_the_logits_alone(logits: tuple[Tensor, Tensor]) -> None:
    p, q = (x.clone() for x in logits)
    kl_of_logits(p, q)
    assert torch.equal(p, logits[0])
    assert torch.equal(q, logits[1])


def test_a_token_that_is_ruled_out_contributes_nothing() -> None:
    """Whatever the other model says of it, ruled out too or not; but what is ruled out alone costs infinitely much."""
    p = torch.tensor([[0.0, 1.0, -torch.inf, -torch.inf]])
    q = torch.tensor([[0.0, 1.0, -torch.inf, 2.0]])
    rest = q[:, [0, 1, 3]].log_softmax(-1)
    assert kl_of_logits(p, q).item() == pytest.approx(kl(p[:, :2].log_softmax(-1), rest[:, :2]).item())
    assert kl_of_logits(q, p).item() == torch.inf


def test_float64_stays_float64() -> None:
    near = torch.randn(TOKENS, VOCABULARY, dtype=torch.float64)
    far = near + 1e-7 * torch.randn(TOKENS, VOCABULARY, dtype=torch.float64)
    value = kl_of_logits(near, far)
    assert value.dtype == torch.float64
    assert (value - reference(near, far)).abs().max() < 1e-15
    assert 0 < value.max() < 1e-12  # lost in float32
