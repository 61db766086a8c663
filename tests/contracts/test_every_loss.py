"""Every loss on predictions through the same tests. A new one is tested by standing in LOSSES; it needs a reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distill.losses import LOSSES, LossSpec, LossTerm
from distill.losses.head_losses import KL, Head, Signal, head_losses
from distill.losses.tile import LogitTile

VOCABULARY, TOKENS = 11, 24


Array = np.ndarray
Reference = Callable[[Any, Array, Array, Array, Array], Array]
"""(loss, student's logits, teacher's, targets, student's logits for what carries no gradient) -> loss of each token."""


def _softmax(logits: Array, temperature: float = 1.0) -> Array:
    powers = np.exp(logits / temperature)
    return powers / powers.sum(-1, keepdims=True)


def _kl(p: Array, q: Array) -> Array:
    return (p * np.log(p / q)).sum(-1)


def _both(loss: Any, student: Array, teacher: Array) -> tuple[Array, Array]:
    return _softmax(student, loss.temperature), _softmax(teacher, loss.temperature)


def _forward_kl(loss: Any, student: Array, teacher: Array, targets: Array, held: Array) -> Array:
    q, p = _both(loss, student, teacher)
    return loss.temperature**2 * _kl(p, q)


def _reverse_kl(loss: Any, student: Array, teacher: Array, targets: Array, held: Array) -> Array:
    q, p = _both(loss, student, teacher)
    return loss.temperature**2 * _kl(q, p)


def _jensen_shannon(loss: Any, student: Array, teacher: Array, targets: Array, held: Array) -> Array:
    q, p = _both(loss, student, teacher)
    m = loss.beta * p + (1 - loss.beta) * q
    return loss.temperature**2 * (loss.beta * _kl(p, m) + (1 - loss.beta) * _kl(q, m))


def _skewed_forward_kl(loss: Any, student: Array, teacher: Array, targets: Array, held: Array) -> Array:
    q, p = _both(loss, student, teacher)
    return loss.temperature**2 * _kl(p, loss.alpha * p + (1 - loss.alpha) * q)


def _skewed_reverse_kl(loss: Any, student: Array, teacher: Array, targets: Array, held: Array) -> Array:
    q, p = _both(loss, student, teacher)
    return loss.temperature**2 * _kl(q, (1 - loss.alpha) * p + loss.alpha * q)


def _adaptive_kl(loss: Any, student: Array, teacher: Array, targets: Array, held: Array) -> Array:
    q, p = _both(loss, student, teacher)
    kept = _softmax(held, loss.temperature)
    found = np.empty(p.shape[:-1])
    for at in np.ndindex(*found.shape):
        mass, head, tail = 0.0, 0.0, 0.0
        for v in sorted(range(p.shape[-1]), key=lambda v: -p[at][v]):
            gap = abs(p[at][v] - kept[at][v])
            head, tail = (head + gap, tail) if mass < loss.mu else (head, tail + gap)
            mass += p[at][v]
        found[at] = (head * _kl(p[at], q[at]) + tail * _kl(q[at], p[at])) / (head + tail)
    return loss.temperature**2 * found


def _total_variation(loss: Any, student: Array, teacher: Array, targets: Array, held: Array) -> Array:
    return 1 - np.minimum(_softmax(student), _softmax(teacher)).sum(-1)


def _standardized_kl(loss: Any, student: Array, teacher: Array, targets: Array, held: Array) -> Array:
    student, teacher = ((z - z.mean(-1, keepdims=True)) / z.std(-1, keepdims=True) for z in (student, teacher))
    return _forward_kl(loss, student, teacher, targets, held)


def _decoupled_kd(loss: Any, student: Array, teacher: Array, targets: Array, held: Array) -> Array:
    q, p = _both(loss, student, teacher)
    found = np.empty(targets.shape)
    for at, y in np.ndenumerate(targets):
        sure = _kl(np.array([p[at][y], 1 - p[at][y]]), np.array([q[at][y], 1 - q[at][y]]))
        others_p, others_q = np.delete(p[at], y), np.delete(q[at], y)
        found[at] = loss.alpha * sure + loss.beta * _kl(others_p / others_p.sum(), others_q / others_q.sum())
    return loss.temperature**2 * found


def _cross_entropy(loss: Any, student: Array, teacher: Array, targets: Array, held: Array) -> Array:
    return -np.log(np.take_along_axis(_softmax(student), targets[..., None], -1)[..., 0])


def _embedding_cosine(loss: Any, student: Array, teacher: Array, targets: Array, held: Array) -> Array:
    return 1 - (student * teacher).sum(-1) / np.sqrt((student**2).sum(-1) * (teacher**2).sum(-1))


def _score_mse(loss: Any, student: Array, teacher: Array, targets: Array, held: Array) -> Array:
    return (student[..., 0] - teacher[..., 0]) ** 2


def _label_mse(loss: Any, student: Array, teacher: Array, targets: Array, held: Array) -> Array:
    return (student[..., 0] - targets) ** 2


REFERENCES: dict[str, Reference] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jensen_shannon": _jensen_shannon,
    "skewed_forward_kl": _skewed_forward_kl,
    "skewed_reverse_kl": _skewed_reverse_kl,
    "adaptive_kl": _adaptive_kl,
    "total_variation": _total_variation,
    "standardized_kl": _standardized_kl,
    "decoupled_kd": _decoupled_kd,
    "cross_entropy": _cross_entropy,
    "embedding_cosine": _embedding_cosine,
    "score_mse": _score_mse,
    "label_mse": _label_mse,
}
"""Loss of each token in float64, from probabilities, as the papers write it."""

SETTINGS: dict[str, list[dict[str, float]]] = {
    "jensen_shannon": [{"beta": 0.05}, {"beta": 0.9, "temperature": 2.0}],
    "skewed_forward_kl": [{"alpha": 0.6, "temperature": 2.0}],
    "skewed_reverse_kl": [{"alpha": 0.6, "temperature": 2.0}],
    "adaptive_kl": [{"mu": 0.05}, {"mu": 0.95, "temperature": 2.0}],
    "decoupled_kd": [{"alpha": 0.0, "beta": 8.0}, {"beta": 0.0}, {"alpha": 0.5, "beta": 2.0, "temperature": 2.0}],
}
"""What else than temperatures a loss is tried with."""

KINKED = {"total_variation"}
"""Losses whose gradient does not vanish on the way to agreement, as their files say."""


MEMBERS = {kind: member for kind, member in LOSSES.items() if issubclass(member, LossSpec)}


class _ClosedForm(torch.autograd.Function):
    """Value and gradient as training takes them, in the place of the pure function."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor | None, targets: Tensor, mask: Tensor, loss: Any) -> Tensor:
        on = mask.flatten()
        # copies of selected rows, as the closed form writes to its logits
        ours, theirs = (None if x is None else x.flatten(0, -2)[on].float() for x in (student, teacher))
        assert ours is not None
        gradient = torch.zeros_like(student).flatten(0, -2)
        value = torch.zeros(())
        if on.any():
            tile = LogitTile(ours, theirs, targets.flatten()[on])
            if theirs is not None and loss.has_in_place:
                value, found = loss.in_place(tile).value, tile.shared()[0]
            else:
                value, found = loss.value_and_gradient(tile)
            gradient[on.nonzero(), torch.arange(found.shape[-1])] = found.to(student.dtype)
        ctx.gradient = gradient.view_as(student)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.gradient * grad, None, None, None, None


def _call(loss: Any, student: Tensor, teacher: Tensor | None, targets: Tensor, mask: Tensor) -> LossTerm:
    plain = MEMBERS[loss.kind].model_construct(**dict(loss))  # its own call, for a loss without a closed form
    return LossTerm(_ClosedForm.apply(student, teacher, targets, mask, plain), mask.sum())


def _members() -> list[tuple[str, Any]]:
    """Every loss, and once more with its closed form as the function that the tests call."""
    closed = [(kind, type(f"Closed{m.__name__}", (m,), {"__call__": _call})) for kind, m in MEMBERS.items()]
    return [*MEMBERS.items(), *closed]


def _cases() -> list[LossSpec]:
    specs: list[Any] = []
    for kind, member in _members():
        specs.append(member(kind=kind))
        if "temperature" in member.model_fields:
            specs += [member(kind=kind, temperature=0.5), member(kind=kind, temperature=3.0)]
        specs += [member(kind=kind, **settings) for settings in SETTINGS.get(kind, [])]
    return specs


def _name(spec: LossSpec) -> str:
    settings = "-".join(str(value) for key, value in spec.model_dump().items() if key != "weight")
    return f"{settings}-closed" if type(spec).__name__.startswith("Closed") else settings


every_loss = pytest.mark.parametrize("loss", _cases(), ids=_name)
divergences_of_distributions = pytest.mark.parametrize(
    "loss", [s for s in _cases() if s.needs_teacher and s.compares == "distributions"], ids=_name
)
every_divergence = pytest.mark.parametrize("loss", [s for s in _cases() if s.needs_teacher], ids=_name)


class Data:
    """Random logits, targets and a mask of [2, TOKENS / 2], and a linear head over random hidden states."""

    def __init__(self) -> None:
        random = torch.Generator().manual_seed(0)
        shape = (2, TOKENS // 2)
        self.student = 2 * torch.randn(*shape, VOCABULARY, generator=random)
        self.teacher = 2 * torch.randn(*shape, VOCABULARY, generator=random)
        self.targets = torch.randint(0, VOCABULARY, shape, generator=random)
        self.mask = torch.rand(shape, generator=random) < 0.7
        self.hidden = torch.randn(*shape, 8, generator=random)
        self.teacher_hidden = torch.randn(*shape, 6, generator=random)
        self.head, self.teacher_head = nn.Linear(8, VOCABULARY), nn.Linear(6, VOCABULARY, bias=False)
        for parameter in (*self.head.parameters(), *self.teacher_head.parameters()):
            parameter.data = torch.randn(parameter.shape, generator=random)

    def signal(self) -> Signal:
        return Signal(self.teacher_hidden, Head(self.teacher_head, tuple(self.teacher_head.parameters())))

    def chunked(
        self, loss: LossSpec, chunk_tokens: int, mask: Tensor | None = None
    ) -> tuple[Tensor, dict[str, LossTerm], list[Tensor]]:
        """head_losses with its gradients: of the hidden states, the head's weight and its bias."""
        hidden = self.hidden.clone().requires_grad_()
        self.head.zero_grad()
        total, terms = head_losses(
            hidden,
            Head(self.head, tuple(self.head.parameters())),
            self.signal(),
            self.targets,
            self.mask if mask is None else mask,
            [(loss.kind, loss)],
            chunk_tokens=chunk_tokens,
        )
        total.backward()
        return total.detach(), terms, [hidden.grad, self.head.weight.grad, self.head.bias.grad]  # type: ignore[list-item]


@pytest.fixture
def data() -> Data:
    return Data()


def reference(loss: LossSpec, data: Data, student: Tensor | None = None) -> Array:
    """Loss per token, [2, TOKENS / 2], float64; what carries no gradient stays where the data have it."""
    student = data.student if student is None else student
    logits = [x.double().numpy() for x in (student, data.teacher)]
    return REFERENCES[loss.kind](loss, *logits, data.targets.numpy(), data.student.double().numpy())


def test_every_loss_has_a_reference() -> None:
    assert set(REFERENCES) == set(MEMBERS)


@every_loss
def test_value_is_the_papers(loss: LossSpec, data: Data) -> None:
    term = loss(data.student, data.teacher, data.targets, data.mask)
    expected = reference(loss, data)[data.mask.numpy()]
    assert term.sum.dtype == torch.float32
    assert term.sum.shape == term.count.shape == ()
    assert term.count.item() == len(expected) == data.mask.sum().item()
    assert term.sum.item() == pytest.approx(expected.sum(), rel=1e-5)
    assert term.per_token().item() == pytest.approx(expected.mean(), rel=1e-5)


@every_loss
def test_says_whether_it_needs_the_text(loss: LossSpec, data: Data) -> None:
    """Sequences of the student's own have no next token of the text, and a loss that looks at it must not meet them."""
    one, other = (
        loss(data.student, data.teacher, targets, data.mask).sum
        for targets in (data.targets, (data.targets + 1) % VOCABULARY)
    )
    assert loss.needs_text == (one.item() != other.item())


@every_loss
def test_gradient_is_that_of_the_float64_reference(loss: LossSpec, data: Data) -> None:
    student = data.student.clone().requires_grad_()
    loss(student, data.teacher, data.targets, data.mask).sum.backward()
    step = 1e-5
    expected = torch.zeros_like(data.student, dtype=torch.float64)
    for v in range(VOCABULARY):  # tokens do not touch each other, so one vocabulary entry of all of them at once
        shift = torch.zeros(VOCABULARY, dtype=torch.float64)
        shift[v] = step
        up, down = (reference(loss, data, data.student.double() + sign * shift) for sign in (1, -1))
        expected[..., v] = torch.from_numpy((up - down) / (2 * step))
    expected[~data.mask] = 0
    torch.testing.assert_close(student.grad.double(), expected, rtol=1e-4, atol=1e-5)  # type: ignore[union-attr]


@every_divergence
def test_zero_at_agreement_and_nowhere_less(loss: LossSpec, data: Data) -> None:
    shift = torch.randn(2, TOKENS // 2, 1) if loss.compares == "distributions" else torch.zeros(1)
    shifted = (data.teacher + shift).requires_grad_()  # the same distribution
    term = loss(shifted, data.teacher, data.targets, data.mask)
    term.sum.backward()
    assert abs(term.sum.item()) < 1e-4
    if loss.kind not in KINKED:
        assert shifted.grad.abs().max() < 1e-5  # type: ignore[union-attr]
    same = data.teacher.clone().requires_grad_()
    loss(same, data.teacher, data.targets, data.mask).sum.backward()
    assert same.grad.abs().max() < 1e-5  # type: ignore[union-attr]
    for size in (1e-2, 1.0, 30.0):
        other = data.teacher + size * torch.randn(data.teacher.shape)
        for t in range(TOKENS // 2):
            one = torch.zeros_like(data.mask)
            one[0, t] = True
            assert loss(other, data.teacher, data.targets, one).sum.item() > -1e-5


@pytest.mark.parametrize("loss", [s for s in _cases() if not s.needs_teacher], ids=_name)
def test_a_loss_without_teacher_is_least_when_sure_of_the_text(loss: LossSpec, data: Data) -> None:
    sure = 40.0 * nn.functional.one_hot(data.targets, VOCABULARY).float()
    if loss.compares == "values":
        sure = data.targets.unsqueeze(-1).float()
    assert loss(sure, None, data.targets, data.mask).sum.item() == pytest.approx(0, abs=1e-6)
    assert torch.equal(
        loss(data.student, None, data.targets, data.mask).sum,
        loss(data.student, data.teacher, data.targets, data.mask).sum,
    )


with_temperature = pytest.mark.parametrize("loss", [s for s in _cases() if hasattr(s, "temperature")], ids=_name)


@with_temperature
def test_temperature_squared_is_on_the_gradient(loss: Any, data: Data) -> None:
    """Hinton's limit: at a high temperature the gradient no longer depends on it; each loss has a size of its own."""
    student = data.student.clone().requires_grad_()
    hot = loss.model_copy(update={"temperature": 200.0})
    hot(student, data.teacher, data.targets, torch.ones_like(data.mask)).sum.backward()
    limit = _hot_limit(loss, data)
    torch.testing.assert_close(student.grad, limit, rtol=0.05, atol=0.02 * limit.abs().max().item())


def _hot_limit(loss: Any, data: Data) -> Tensor:
    difference = data.student - data.teacher
    if loss.kind == "standardized_kl":
        scale = data.student.std(-1, correction=0, keepdim=True)
        student, teacher = (
            (z - z.mean(-1, keepdim=True)) / z.std(-1, correction=0, keepdim=True) for z in (data.student, data.teacher)
        )
        return ((student - teacher) - student * (student * (student - teacher)).mean(-1, keepdim=True)) / (
            scale * VOCABULARY
        )
    if loss.kind == "decoupled_kd":
        target = nn.functional.one_hot(data.targets, VOCABULARY).bool()
        mean = difference.masked_fill(target, 0).sum(-1, keepdim=True) / (VOCABULARY - 1)
        above = (difference - mean).masked_fill(~target, 0).sum(-1, keepdim=True)
        sure = torch.where(target, (VOCABULARY - 1) * above, -above) / VOCABULARY**2
        return loss.alpha * sure + loss.beta * (difference - mean).masked_fill(target, 0) / (VOCABULARY - 1)
    size = {
        "jensen_shannon": lambda: loss.beta * (1 - loss.beta),
        "skewed_forward_kl": lambda: (1 - loss.alpha) ** 2,
        "skewed_reverse_kl": lambda: (1 - loss.alpha) ** 2,
    }.get(loss.kind, lambda: 1.0)()
    return size * (difference - difference.mean(-1, keepdim=True)) / VOCABULARY


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_gradient_has_its_closed_form(kind: str, temperature: float, data: Data) -> None:
    loss: Any = LOSSES[kind](kind=kind, temperature=temperature)  # type: ignore[call-arg]
    student = data.student.clone().requires_grad_()
    loss(student, data.teacher, data.targets, torch.ones_like(data.mask)).sum.backward()
    q, p = _both(loss, data.student.double().numpy(), data.teacher.double().numpy())
    if kind == "forward_kl":
        expected = temperature * (q - p)
    else:
        ratio = np.log(q / p)
        expected = temperature * q * (ratio - (q * ratio).sum(-1, keepdims=True))
    torch.testing.assert_close(student.grad.double(), torch.from_numpy(expected), rtol=1e-4, atol=1e-5)  # type: ignore[union-attr]


@every_loss
@pytest.mark.parametrize("chunk_tokens", [1, 3, 7, 10_000])
def test_chunked_is_plain(loss: LossSpec, chunk_tokens: int, data: Data) -> None:
    """Whole logits and autograd on one side, chunks on the other."""
    total, terms, gradients = data.chunked(loss, chunk_tokens)
    hidden = data.hidden.clone().requires_grad_()
    data.head.zero_grad()
    logits, teacher_logits = data.head(hidden), data.teacher_head(data.teacher_hidden).detach()
    plain = loss(logits, teacher_logits, data.targets, data.mask)
    plain.sum.backward()
    torch.testing.assert_close(total, plain.sum.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(terms[loss.kind].sum, total)
    assert terms[loss.kind].count == plain.count
    for ours, theirs in zip(gradients, (hidden.grad, data.head.weight.grad, data.head.bias.grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert (KL in terms) == (loss.compares == "distributions")
    if KL not in terms:
        return
    kl = LOSSES["forward_kl"]()(logits.detach(), teacher_logits, data.targets, data.mask)  # type: ignore[call-arg, operator]
    torch.testing.assert_close(terms[KL].sum, kl.sum, rtol=1e-5, atol=1e-5)


closed_forms = pytest.mark.parametrize(
    "loss", [s for s in _cases() if type(s) is MEMBERS[s.kind] and s.compares == "distributions"], ids=_name
)


@closed_forms
@pytest.mark.parametrize("size", [0.1, 1.0, 10.0])
def test_the_closed_form_is_what_autograd_finds(loss: LossSpec, size: float, data: Data) -> None:
    """Over heads of different width too, and with what other losses have left of the same tile."""
    student, teacher, targets = _logits(size, data)
    expected, gradient = LossSpec.value_and_gradient(loss, LogitTile(student.clone(), teacher.clone(), targets))
    tile = LogitTile(student.clone(), teacher.clone(), targets)
    for spec in (LOSSES["cross_entropy"](), LOSSES["forward_kl"](), loss):  # type: ignore[call-arg]
        value, found = spec.value_and_gradient(tile)  # type: ignore[attr-defined]
    forms = [(value, found)]
    tile = LogitTile(student.clone(), teacher.clone(), targets)
    if loss.has_in_place:
        forms.append((loss.in_place(tile).value, tile.shared()[0]))
    # what fp32 leaves of a difference of two logarithms, per token
    rounding = 1e-6 * TOKENS * getattr(loss, "temperature", 1.0) ** 2
    for value, found in forms:
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=rounding)
        width = found.shape[-1]
        atol = 1e-5 * max(1.0, gradient.abs().max().item())
        torch.testing.assert_close(found, gradient[:, :width], rtol=1e-4, atol=atol)
        assert not gradient[:, width:].any()


def _logits(size: float, data: Data) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of two heads of different width, and targets, [TOKENS, ...]."""
    torch.manual_seed(0)
    student, teacher = (size * torch.randn(TOKENS, VOCABULARY + extra) for extra in (3, 1))
    return student, teacher, data.targets.flatten()


@closed_forms
def test_a_closed_form_overwrites_nothing_that_is_shared(loss: Any, data: Data) -> None:
    """Neither a distribution, nor the gradient of another loss, nor what of the logits counts: all but a constant."""
    student, teacher, targets = _logits(1.0, data)
    tile = LogitTile(student.clone(), teacher.clone(), targets)
    other: Any = LOSSES["reverse_kl"]()  # type: ignore[call-arg]
    _, before = other.value_and_gradient(tile)
    temperature = getattr(loss, "temperature", 1.0)
    shared = [before, *tile.own(), *tile.pair(1.0), *tile.pair(temperature), tile.forward_kl(temperature)]
    copies = [tensor.clone() for tensor in shared]
    _, gradient = loss.value_and_gradient(tile)
    kept = gradient.clone()
    other.value_and_gradient(tile)
    tile.kl()
    assert torch.equal(gradient, kept)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(shared, copies, strict=True))
    width = min(student.shape[-1], teacher.shape[-1])
    for now, then in zip(tile.shared(), (student[:, :width], teacher[:, :width]), strict=True):
        torch.testing.assert_close(now.log_softmax(-1), then.log_softmax(-1))


@closed_forms
def test_only_forward_kl_at_temperature_1_overwrites_the_logits(loss: Any, data: Data) -> None:
    assert loss.has_in_place == (loss.kind == "forward_kl" and loss.temperature == 1.0)
    if not loss.has_in_place:
        student, teacher, targets = _logits(1.0, data)
        with pytest.raises(NotImplementedError, match=loss.kind):
            LossSpec.in_place(loss, LogitTile(student, teacher, targets))


@every_loss
@pytest.mark.parametrize("parts", [2, 3, 24])
def test_sums_add_up_over_any_split(loss: LossSpec, parts: int, data: Data) -> None:
    def flat(x: Tensor) -> Tensor:
        return x.flatten(0, 1)

    whole = data.student.clone().requires_grad_()
    expected = loss(whole, data.teacher, data.targets, data.mask)
    expected.sum.backward()
    split = data.student.clone().requires_grad_()
    pieces = zip(*(flat(x).chunk(parts) for x in (split, data.teacher, data.targets, data.mask)), strict=True)
    first, *others = [loss(*piece) for piece in pieces]
    total = sum(others, start=first)
    total.sum.backward()
    torch.testing.assert_close(total.sum, expected.sum, rtol=1e-5, atol=1e-5)
    assert total.count == expected.count
    torch.testing.assert_close(split.grad, whole.grad, rtol=1e-6, atol=1e-7)


@every_loss
def test_masked_tokens_count_for_nothing(loss: LossSpec, data: Data) -> None:
    student = data.student.clone().requires_grad_()
    term = loss(student, data.teacher, data.targets, data.mask)
    term.sum.backward()
    assert not student.grad[~data.mask].any()  # type: ignore[index]
    assert student.grad[data.mask].any(-1).all()  # type: ignore[index]
    other = data.student.masked_fill(~data.mask.unsqueeze(-1), 77.0)
    assert torch.equal(loss(other, data.teacher, data.targets.masked_fill(~data.mask, 0), data.mask).sum, term.sum)

    expected, _, gradients = data.chunked(loss, 5)
    assert not gradients[0][~data.mask].any()
    data.hidden[~data.mask] = data.teacher_hidden[~data.mask] = float("nan")  # never shown to a head
    total, _, again = data.chunked(loss, 5)
    assert torch.equal(total, expected)
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))


@every_loss
def test_a_batch_without_tokens_is_zero_and_runs_backward(loss: LossSpec, data: Data) -> None:
    nothing = torch.zeros_like(data.mask)
    student = data.student.clone().requires_grad_()
    term = loss(student, data.teacher, data.targets, nothing)
    term.sum.backward()
    assert (term.sum.item(), term.count.item(), term.per_token().item()) == (0, 0, 0)
    assert not student.grad.any()  # type: ignore[union-attr]
    total, terms, gradients = data.chunked(loss, 5, nothing)
    assert total.item() == 0
    assert {name: (term.sum.item(), term.count.item()) for name, term in terms.items()} == {
        loss.kind: (0, 0),
        **({KL: (0, 0)} if loss.compares == "distributions" else {}),
    }
    assert not any(gradient.any() for gradient in gradients)


@every_loss
def test_bf16_logits_are_computed_in_fp32(loss: LossSpec, data: Data) -> None:
    student, teacher = data.student.bfloat16().requires_grad_(), data.teacher.bfloat16()
    term = loss(student, teacher, data.targets, data.mask)
    term.sum.backward()
    wide = student.detach().float().requires_grad_()
    expected = loss(wide, teacher.float(), data.targets, data.mask)
    expected.sum.backward()
    assert term.sum.dtype == torch.float32
    assert torch.equal(term.sum, expected.sum)
    assert torch.equal(student.grad, wide.grad.bfloat16())  # type: ignore[union-attr, arg-type]


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_far_apart_stay_finite(loss: LossSpec, dtype: torch.dtype, data: Data) -> None:
    """Probabilities underflow here; log-space does not."""
    student = (500 * data.student).to(dtype).requires_grad_()
    term = loss(student, (-500 * data.teacher).to(dtype), data.targets, data.mask)
    term.sum.backward()
    assert term.sum.isfinite()
    assert term.sum > 0
    assert student.grad.isfinite().all()  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", MEMBERS)
@pytest.mark.parametrize("form", ["pure", "closed"])
def test_a_large_vocabulary_costs_no_digits(kind: str, form: str) -> None:
    """Near agreement, where sums over many small differences cancel; what is lost is some last digits of log V."""
    members = _members()[: len(MEMBERS)] if form == "pure" else _members()[len(MEMBERS) :]
    loss = dict(members)[kind](kind=kind)
    shape, random = (1, 248_000), torch.Generator().manual_seed(0)
    teacher = 3 * torch.randn(shape, generator=random)
    student = (teacher + 0.05 * torch.randn(shape, generator=random)).bfloat16()
    teacher, targets, on = teacher.bfloat16(), torch.tensor([200_000]), torch.ones(1, dtype=torch.bool)
    logits = [x.double().numpy() for x in (student, teacher)]
    expected = REFERENCES[kind](loss, *logits, targets.numpy(), logits[0]).sum()
    assert loss(student, teacher, targets, on).sum.item() == pytest.approx(expected, rel=1e-3, abs=1e-5)


@divergences_of_distributions
@pytest.mark.parametrize(("student_extra", "teacher_extra"), [(5, 0), (0, 5), (3, 2)])
def test_padded_vocabularies_are_compared_over_shared_tokens(
    loss: LossSpec, student_extra: int, teacher_extra: int, data: Data
) -> None:
    def padded(logits: Tensor, extra: int) -> Tensor:
        return torch.cat([logits, 50 + torch.zeros(*logits.shape[:-1], extra)], -1)

    # where both are padded, the narrower padding is indistinguishable from tokens
    both = min(student_extra, teacher_extra)
    expected = loss(padded(data.student, both), padded(data.teacher, both), data.targets, data.mask)
    student = padded(data.student, student_extra).requires_grad_()
    term = loss(student, padded(data.teacher, teacher_extra), data.targets, data.mask)
    term.sum.backward()
    assert torch.equal(term.sum, expected.sum)
    assert not student.grad[..., VOCABULARY + both :].any()  # type: ignore[index]
    agreed = loss(padded(data.teacher, student_extra), padded(data.teacher, teacher_extra), data.targets, data.mask)
    assert abs(agreed.sum.item()) < 1e-4


@every_loss
def test_every_number_may_follow_a_schedule(loss: LossSpec, data: Data) -> None:
    """At any step it is the loss with the plain numbers of that step."""
    numbers = {key: value for key, value in loss.model_dump().items() if key != "kind" and value}
    moving = {key: {"kind": "linear", "start": value, "end": value * 1.04} for key, value in numbers.items()}
    changing = type(loss).model_validate(loss.model_dump() | moving)
    assert set(changing.schedules()) == set(numbers)
    with pytest.raises(ValueError, match=r"call loss\.at\(step, num_steps\) first"):
        data.chunked(changing, 5)
    for step, factor in ((0, 1.0), (5, 1.02), (10, 1.04), (99, 1.04)):
        now = changing.at(step, 10)
        plain = type(loss).model_validate(loss.model_dump() | {key: value * factor for key, value in numbers.items()})
        assert now.model_dump() == pytest.approx(plain.model_dump())
        assert torch.allclose(data.chunked(now, 5)[0], data.chunked(plain, 5)[0], rtol=1e-6)
    assert loss.at(3, 10) is loss
