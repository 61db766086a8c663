import pytest
import torch
from pydantic import ValidationError

from distill.losses import ForwardKL, LossTerm
from distill.losses.base import masked_sum, shared_log_probs


def test_terms_add_up_and_divide_once() -> None:
    term = LossTerm(torch.tensor(6.0), torch.tensor(2)) + LossTerm(torch.tensor(1.0), torch.tensor(5))
    assert (term.sum.item(), term.count.item(), term.per_token().item()) == (7, 7, 1)


def test_per_token_of_nothing_is_zero() -> None:
    assert LossTerm(torch.tensor(0.0), torch.tensor(0)).per_token() == 0


def test_detach_leaves_no_graph() -> None:
    term = masked_sum(torch.ones(3, requires_grad=True) * 2, torch.tensor([True, False, True]))
    assert term.sum.requires_grad
    assert not term.detach().sum.requires_grad
    assert term.detach().sum == 4


def test_shared_log_probs_are_fp32_and_normalised_over_the_shared_tokens() -> None:
    student, teacher = shared_log_probs(torch.randn(4, 9).bfloat16(), torch.randn(4, 7).bfloat16(), 2.0)
    for log_probs in (student, teacher):
        assert log_probs.dtype == torch.float32
        assert log_probs.shape == (4, 7)
        torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(4))


@pytest.mark.parametrize("settings", [{"weight": 0}, {"weight": -1}, {"temperature": 0}, {"temprature": 2}])
def test_settings_without_sense_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        ForwardKL(**settings)
