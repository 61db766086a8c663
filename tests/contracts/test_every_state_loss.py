"""Every loss on inner states through the same tests. A new one is tested by standing in LOSSES; it owes a reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.core.errors import InputError
from distill.losses import LOSSES, LossTerm, StateLossSpec, attention_relation
from distill.losses.layer_losses import HiddenLossSpec, refusal

BATCH, LENGTH = 3, 6
Array = np.ndarray


def _hidden_mse(loss: Any, student: Array, teacher: Array, mask: Array) -> Array:
    found = np.mean((student - teacher) ** 2, -1)
    return found / np.mean(teacher**2, -1) if loss.scale == "teacher" else found


def _hidden_cosine(loss: Any, student: Array, teacher: Array, mask: Array) -> Array:
    lengths = np.sqrt((student**2).sum(-1) * (teacher**2).sum(-1))
    return 1 - (student * teacher).sum(-1) / lengths


def _attention_relation(loss: Any, student: Array, teacher: Array, mask: Array) -> Array:
    found = np.zeros(mask.shape)
    for b, i in np.argwhere(mask):
        seen = [j for j in range(i + 1) if mask[b, j]]
        for head in range(loss.num_relation_heads):
            rows = []
            for vectors in (teacher, student):
                width = vectors.shape[-1] // loss.num_relation_heads
                mine = vectors[b, :, head * width : (head + 1) * width]
                powers = np.exp(mine[seen] @ mine[i] / np.sqrt(width))
                rows.append(powers / powers.sum())
            found[b, i] += (rows[0] * np.log(rows[0] / rows[1])).sum() / loss.num_relation_heads
    return found


def _attention_score(loss: Any, student: Array, teacher: Array, mask: Array) -> Array:
    found = np.zeros(mask.shape)
    for b, i in np.argwhere(mask):
        seen = [j for j in range(i + 1) if mask[b, j]]
        scores = []
        for states in (teacher, student):
            queries, keys = np.split(states[b], 2, -1)
            scores.append(keys[seen] @ queries[i] / np.sqrt(queries.shape[-1]))
        found[b, i] = ((scores[0] - scores[1]) ** 2).mean()
    return found


Reference = Callable[[Any, Array, Array, Array], Array]
REFERENCES: dict[str, Reference] = {
    "hidden_mse": _hidden_mse,
    "hidden_cosine": _hidden_cosine,
    "attention_relation": _attention_relation,
    "attention_score": _attention_score,
}
"""(loss, student's states, teacher's, mask) -> loss of each token that counts, float64, as the files write it."""

SETTINGS: dict[str, list[dict[str, Any]]] = {
    "hidden_mse": [{"scale": "none"}, {"scale": "teacher"}],
    "attention_relation": [{"num_relation_heads": 1}, {"num_relation_heads": 4}],
}


def _cases() -> list[StateLossSpec]:
    found: list[Any] = []
    for kind, member in LOSSES.items():
        if issubclass(member, StateLossSpec):
            found += [member(kind=kind, **settings) for settings in SETTINGS.get(kind, [{}])]
    return found


def _name(loss: Any) -> str:
    return "-".join(str(value) for key, value in loss.model_dump().items() if key not in ("weight", "layers"))


every_loss = pytest.mark.parametrize("loss", _cases(), ids=_name)


class Data:
    """Random states of [BATCH, LENGTH, width] and a mask in which one sequence counts for nothing."""

    def __init__(self, loss: StateLossSpec) -> None:
        random = torch.Generator().manual_seed(0)
        widths = (8, 8) if isinstance(loss, HiddenLossSpec) else (8, 12)  # relations need no equal widths
        self.student, self.teacher = (torch.randn(BATCH, LENGTH, width, generator=random) for width in widths)
        self.mask = torch.rand(BATCH, LENGTH, generator=random) < 0.8
        self.mask[1] = False


@pytest.fixture
def data(loss: StateLossSpec) -> Data:
    return Data(loss)


def reference(loss: StateLossSpec, data: Data, student: Tensor | None = None) -> float:
    """The whole sum, float64."""
    states = [x.double().numpy() for x in (data.student if student is None else student, data.teacher)]
    mask = data.mask.numpy()
    return float(REFERENCES[loss.kind](loss, *states, mask)[mask].sum())


def with_gradient(loss: StateLossSpec, student: Tensor, teacher: Tensor, mask: Tensor) -> tuple[LossTerm, Tensor]:
    leaf = student.clone().requires_grad_()
    term = loss(leaf, teacher, mask)
    term.sum.backward()
    assert leaf.grad is not None
    return term, leaf.grad


def test_every_loss_has_a_reference() -> None:
    assert set(REFERENCES) == {loss.kind for loss in _cases()}


@every_loss
def test_value_is_the_papers(loss: StateLossSpec, data: Data) -> None:
    term = loss(data.student, data.teacher, data.mask)
    assert term.sum.dtype == torch.float32
    assert term.sum.shape == term.count.shape == ()
    assert term.count.item() == data.mask.sum().item()
    assert term.sum.item() == pytest.approx(reference(loss, data), rel=1e-5)


@every_loss
def test_gradient_is_that_of_the_float64_reference(loss: StateLossSpec, data: Data) -> None:
    _, gradient = with_gradient(loss, data.student, data.teacher, data.mask)
    step, expected = 1e-5, torch.zeros_like(data.student, dtype=torch.float64)
    for at in np.ndindex(*data.student.shape):
        shift = torch.zeros_like(expected)
        shift[at] = step
        up, down = (reference(loss, data, data.student.double() + sign * shift) for sign in (1, -1))
        expected[at] = (up - down) / (2 * step)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-6)


@every_loss
def test_zero_at_agreement_and_nowhere_less(loss: StateLossSpec, data: Data) -> None:
    term, gradient = with_gradient(loss, data.teacher, data.teacher, data.mask)
    assert abs(term.sum.item()) < 1e-5
    assert gradient.abs().max() < 1e-5
    for size in (1e-2, 1.0, 30.0):
        other = data.teacher + size * torch.randn(data.teacher.shape)
        for b, i in data.mask.nonzero():
            one = torch.zeros_like(data.mask)
            one[b, i] = True
            assert loss(other, data.teacher, one).sum.item() > -1e-6
        assert loss(other, data.teacher, data.mask).sum.item() > 1e-6


@every_loss
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 2), (2, 1)])
def test_sums_add_up_over_micro_batches(loss: StateLossSpec, sizes: tuple[int, ...], data: Data) -> None:
    whole, gradient = with_gradient(loss, data.student, data.teacher, data.mask)
    pieces = [with_gradient(loss, *p) for p in zip(*(x.split(sizes) for x in vars(data).values()), strict=True)]
    first, *others = [term for term, _ in pieces]
    total = sum(others, start=first)
    torch.testing.assert_close(total.sum, whole.sum, rtol=1e-6, atol=1e-6)
    assert total.count == whole.count
    torch.testing.assert_close(torch.cat([g for _, g in pieces]), gradient, rtol=1e-6, atol=1e-7)


@every_loss
def test_masked_tokens_count_for_nothing(loss: StateLossSpec, data: Data) -> None:
    term, gradient = with_gradient(loss, data.student, data.teacher, data.mask)
    assert not gradient[~data.mask].any()
    assert gradient[data.mask].any()
    student, teacher = (x.masked_fill(~data.mask.unsqueeze(-1), 77.0) for x in (data.student, data.teacher))
    again, same = with_gradient(loss, student, teacher, data.mask)
    assert torch.equal(again.sum, term.sum)
    assert torch.equal(same, gradient)


@every_loss
def test_documents_in_one_row_are_as_each_alone(loss: StateLossSpec, data: Data) -> None:
    sizes = [2, 1, 3]
    numbers = torch.repeat_interleave(torch.arange(3), torch.tensor(sizes)).expand(BATCH, -1)
    leaf = data.student.clone().requires_grad_()
    term = loss(leaf, data.teacher, data.mask, numbers)
    term.sum.backward()
    alone = [with_gradient(loss, *p) for p in zip(*(x.split(sizes, 1) for x in vars(data).values()), strict=True)]
    torch.testing.assert_close(term.sum, torch.stack([one.sum for one, _ in alone]).sum(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(leaf.grad, torch.cat([g for _, g in alone], 1), rtol=1e-5, atol=1e-6)


@every_loss
def test_a_batch_without_tokens_is_zero_and_runs_backward(loss: StateLossSpec, data: Data) -> None:
    nothing = torch.zeros_like(data.mask)
    for scale in (1.0, 0.0):  # what does not count arrives as zeros
        term, gradient = with_gradient(loss, scale * data.student, scale * data.teacher, nothing)
        assert (term.sum.item(), term.count.item(), term.per_token().item()) == (0, 0, 0)
        assert not gradient.any()
        assert gradient.isfinite().all()


@every_loss
def test_bf16_states_are_compared_in_fp32(loss: StateLossSpec, data: Data) -> None:
    student, teacher = data.student.bfloat16(), data.teacher.bfloat16()
    leaf = student.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        term = loss(leaf, teacher, data.mask)
    term.sum.backward()
    expected, wide = with_gradient(loss, student.float(), teacher.float(), data.mask)
    assert term.sum.dtype == torch.float32
    assert torch.equal(term.sum, expected.sum)
    assert torch.equal(leaf.grad, wide.bfloat16())  # type: ignore[arg-type]


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_far_apart_stay_finite(loss: StateLossSpec, dtype: torch.dtype, data: Data) -> None:
    """A few channels of a large decoder are thousands of times the others."""
    term, gradient = with_gradient(loss, (3e3 * data.student).to(dtype), (-3e3 * data.teacher).to(dtype), data.mask)
    assert term.sum.isfinite()
    assert term.sum >= 0
    assert gradient.isfinite().all()


@every_loss
def test_the_weight_may_follow_a_schedule(loss: StateLossSpec) -> None:
    moving = type(loss).model_validate(loss.model_dump() | {"weight": {"kind": "linear", "start": 2, "end": 0}})
    assert list(moving.schedules()) == ["weight"]
    assert [moving.at(step, 10).weight for step in (0, 5, 10)] == [2.0, 1.0, 0.0]
    assert moving.at(5, 10) == loss.model_copy(update={"weight": 1.0})


@every_loss
def test_a_cache_cannot_teach_it(loss: StateLossSpec) -> None:
    assert f"{loss.kind} reads the teacher's hidden layers" in str(refusal([loss]))


@every_loss
def test_layers_meet_as_documented(loss: StateLossSpec) -> None:
    every = loss.model_copy(update={"layers": "auto"})
    assert every.pairs(3, 3) == ((0, 0), (1, 1), (2, 2))
    assert every.pairs(4, 12) == ((0, 2), (1, 5), (2, 8), (3, 11))  # every third, as TinyBERT's map
    assert every.pairs(3, 4) == ((0, 1), (1, 2), (2, 3))
    assert every.pairs(4, 2) == ((0, 0), (1, 0), (2, 1), (3, 1))
    assert every.pairs(3, 6, kept=(0, 1, 5)) == ((0, 0), (1, 1), (2, 5))
    last = loss.model_copy(update={"layers": "last"})
    assert last.pairs(4, 12) == ((3, 11),)
    assert last.pairs(3, 6, kept=(0, 1, 4)) == ((2, 4),)
    by_hand = type(loss).model_validate(loss.model_dump() | {"layers": [[0, 1], [2, 5]]})
    assert by_hand.pairs(3, 6) == ((0, 1), (2, 5))
    with pytest.raises(InputError, match=r"layers: the student has no layer 2 \(expected 0 to 1\)"):
        by_hand.pairs(2, 6)
    with pytest.raises(InputError, match=r"layers: the teacher has no layer 5 \(expected 0 to 4\)"):
        by_hand.pairs(3, 5)
    for wrong in ([], [[1, 2], [1, 3]], [[0, -1]], [[0]], [1], "first", None):
        with pytest.raises(ValueError, match="each of the student's layers once"):
            type(loss).model_validate(loss.model_dump() | {"layers": wrong})


@pytest.mark.parametrize("entries", [1, 40, 200, 1 << 20])
def test_any_chunk_of_rows_gives_the_same_relation(entries: int) -> None:
    loss = LOSSES["attention_relation"](kind="attention_relation", num_relation_heads=2)  # type: ignore[call-arg]
    data = Data(loss)  # type: ignore[arg-type]
    whole, gradient = with_gradient(loss, data.student, data.teacher, data.mask)  # type: ignore[arg-type]
    leaf = data.student.clone().requires_grad_()
    term = attention_relation(leaf, data.teacher, data.mask, num_relation_heads=2, chunk_entries=entries)
    term.sum.backward()
    torch.testing.assert_close(term.sum, whole.sum, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(leaf.grad, gradient, rtol=1e-5, atol=1e-7)


def test_no_relation_is_ever_there_as_a_whole() -> None:
    """Forward and backward, no tensor holds a row for every token."""
    from torch.utils._python_dispatch import TorchDispatchMode

    length, heads = 64, 2

    class Largest(TorchDispatchMode):
        entries = 0

        def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), settings: Any = None) -> Any:
            out = function(*arguments, **(settings or {}))
            for one in out if isinstance(out, list | tuple) else [out]:
                if isinstance(one, Tensor):
                    self.entries = max(self.entries, one.numel())
            return out

    student, teacher = torch.randn(2, length, 8, requires_grad=True), torch.randn(2, length, 8)
    with Largest() as seen:
        term = attention_relation(
            student, teacher, torch.ones(2, length, dtype=torch.bool), num_relation_heads=heads, chunk_entries=2048
        )
        term.sum.backward()
    assert 2 * heads * length * length == 16384
    assert seen.entries == 2048


def test_relation_heads_fit_both_models() -> None:
    loss: Any = LOSSES["attention_relation"](kind="attention_relation")  # type: ignore[call-arg]
    assert loss.between((24, 128), (32, 128)).num_relation_heads == 8
    assert loss.between((8, 128), (8, 128)).num_relation_heads == 8
    assert loss.between((3, 64), (8, 64)).num_relation_heads == 1
    by_hand = loss.model_copy(update={"num_relation_heads": 16})
    assert by_hand.between((3, 64), (8, 64)).num_relation_heads == 16
    with pytest.raises(InputError, match=r"num_relation_heads \(16\) must divide the student's 72 channels"):
        by_hand.between((3, 24), (8, 64))
