"""What losses are for encoders: relations in both directions, weights of tokens, and embeddings; against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distill.core.errors import InputError
from distill.losses import AttentionScore, attention_relation, embedding_cosine, hidden_mse
from distill.losses.base import masked_sum
from distill.training.state_losses import _weights

HEADS, WIDTHS = 4, (8, 12)


def _states() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(3, 6, width, generator=random) for width in WIDTHS)
    attended = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] + [0] * 5])
    return student, teacher, attended


def _relations(student: np.ndarray, teacher: np.ndarray, attended: np.ndarray) -> np.ndarray:
    """MiniLMv2's loss of each token, as the paper writes it: softmax over all tokens of the text."""
    found = np.zeros(attended.shape)
    for b in range(len(attended)):
        size = attended[b].sum()
        for head in range(HEADS):
            rows = []
            for states in (teacher, student):
                width = states.shape[-1] // HEADS
                mine = states[b, :size, head * width : (head + 1) * width]
                powers = np.exp(mine @ mine.T / np.sqrt(width))
                rows.append(powers / powers.sum(-1, keepdims=True))
            found[b, :size] += (rows[0] * np.log(rows[0] / rows[1])).sum(-1) / HEADS
    return found


def test_relations_of_an_encoder_are_over_all_tokens_of_the_text() -> None:
    student, teacher, attended = _states()
    expected = _relations(student.double().numpy(), teacher.double().numpy(), attended.numpy())
    term = attention_relation(student, teacher, attended.bool(), num_relation_heads=HEADS, is_causal=False)
    assert term.sum.item() == pytest.approx(expected.sum(), rel=1e-5)
    assert term.count.item() == attended.sum().item()
    causal = attention_relation(student, teacher, attended.bool(), num_relation_heads=HEADS)
    assert causal.sum.item() != pytest.approx(expected.sum(), rel=1e-2)
    # in several chunks too, and the gradient is that of the formula
    leaf = student.clone().requires_grad_()
    attention_relation(leaf, teacher, attended.bool(), num_relation_heads=HEADS, is_causal=False, chunk_entries=1)
    again = attention_relation(
        leaf, teacher, attended.bool(), num_relation_heads=HEADS, is_causal=False, chunk_entries=1
    )
    assert again.sum.item() == pytest.approx(expected.sum(), rel=1e-5)
    again.sum.backward()
    assert leaf.grad is not None
    step = 1e-5
    for at in ((0, 0, 0), (0, 5, 7), (1, 3, 2)):
        shifts = []
        for sign in (1, -1):
            moved = student.double().numpy().copy()
            moved[at] += sign * step
            shifts.append(_relations(moved, teacher.double().numpy(), attended.numpy()).sum())
        assert leaf.grad[at].item() == pytest.approx((shifts[0] - shifts[1]) / (2 * step), rel=1e-3, abs=1e-6)
    assert not leaf.grad[1, 4:].any()
    assert not leaf.grad[2, 1:].any()


def test_padding_changes_no_loss_on_states() -> None:
    student, _, attended = _states()
    teacher = torch.randn(student.shape, generator=torch.Generator().manual_seed(5))
    for loss in (
        lambda s, t, m: attention_relation(s, t, m, num_relation_heads=2, is_causal=False),
        hidden_mse,
    ):
        other = student.masked_fill(~attended.bool().unsqueeze(-1), 77.0)
        assert torch.equal(loss(student, teacher, attended.bool()).sum, loss(other, teacher, attended.bool()).sum)


@pytest.mark.parametrize("texts", [True, False], ids=["a prediction per text", "some tokens"])
def test_the_tokens_of_a_row_weigh_as_much_as_its_predictions(texts: bool) -> None:
    """So the sum is divided by the number of predictions, in whatever micro-batches it comes."""
    student, _, attended = _states()
    teacher = torch.randn(student.shape, generator=torch.Generator().manual_seed(5))
    counted = torch.ones(3, 1, dtype=torch.bool) if texts else attended.bool() & (torch.arange(6) % 2 == 0)
    weights = _weights(counted, attended)
    torch.testing.assert_close(weights.sum(1), counted.sum(1).float())
    assert not weights[attended == 0].any()
    whole = hidden_mse(student, teacher, weights)
    per_text = [hidden_mse(student[[b]], teacher[[b]], attended[[b]].bool()).per_token() for b in range(3)]
    expected = sum(float(mean) * int(counted[b].sum()) for b, mean in enumerate(per_text))
    assert whole.sum.item() == pytest.approx(expected, rel=1e-5)
    assert _weights(counted, None) is counted


def test_weights_of_zero_hide_what_is_not_finite() -> None:
    values = torch.tensor([1.0, float("nan"), 3.0])
    term = masked_sum(values, torch.tensor([0.5, 0.0, 2.0]))
    assert (term.sum.item(), term.count.item()) == (6.5, 2.5)


def test_embeddings_are_compared_by_their_direction() -> None:
    random = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(5, 1, 7, generator=random) for _ in range(2))
    on = torch.ones(5, 1, dtype=torch.bool)
    term = embedding_cosine(3 * student, 0.1 * teacher, on)
    one, other = (x.double().numpy()[:, 0] for x in (student, teacher))
    cosines = (one * other).sum(-1) / np.sqrt((one**2).sum(-1) * (other**2).sum(-1))
    assert term.sum.item() == pytest.approx((1 - cosines).sum(), rel=1e-5)
    close = embedding_cosine(teacher + 1e-4 * student, teacher, on)  # no digits are lost near agreement
    exact = (other + 1e-4 * one) / np.linalg.norm(other + 1e-4 * one, axis=-1, keepdims=True)
    exact = ((exact - other / np.linalg.norm(other, axis=-1, keepdims=True)) ** 2).sum() / 2
    assert close.sum.item() == pytest.approx(exact, rel=1e-2)
    with pytest.raises(InputError, match="7 channels, the teacher's 6"):
        embedding_cosine(student, teacher[..., :6], on)


@pytest.mark.parametrize("key_heads", [4, 2, 1], ids=["a key per query", "grouped queries", "one key"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["encoder", "causal"])
def test_attention_scores_are_compared_head_by_head(key_heads: int, is_causal: bool) -> None:
    """Against the formula in float64, with queries and keys that are cut out one head at a time."""
    random, channels = torch.Generator().manual_seed(2), (3, 5)
    attended = _states()[2]
    states = [torch.randn(3, 6, (HEADS + key_heads) * size, generator=random) for size in channels]
    expected, size = np.zeros(attended.shape), HEADS // key_heads
    for b, i in np.argwhere(attended.numpy()):
        seen = [j for j in range(6) if attended[b, j] and (j <= i or not is_causal)]
        for head in range(HEADS):
            scores = []
            for tensor, width in zip(states, channels, strict=True):
                values = tensor[b].double().numpy()
                first = (HEADS + head // size) * width  # keys are behind all queries
                keys = values[:, first : first + width]
                scores.append(keys[seen] @ values[i, head * width : (head + 1) * width] / np.sqrt(width))
            expected[b, i] += ((scores[0] - scores[1]) ** 2).mean() / HEADS
    loss = AttentionScore().between(*((HEADS, size) for size in channels))
    term = loss(*states, attended.bool(), is_causal=is_causal)
    assert term.sum.item() == pytest.approx(expected.sum(), rel=1e-5)
    assert term.count.item() == attended.sum().item()
    with pytest.raises(InputError, match="the student has 2 heads for queries or keys and the teacher 4"):
        AttentionScore().between((2, 3), (4, 3))
