"""The chunked path against the plain one for every kind of head, and what it must not do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from distill.losses import CrossEntropy, ForwardKL, LossSpec, ReverseKL
from distill.losses.head_losses import KL, Head, Signal, head_losses
from distill.losses.projection import is_plain
from distill.quantization import Int8Channel
from distill.quantization.lora import absorb_lora
from distill.quantization.prepare import prepare

VOCABULARY, HIDDEN = 13, 8
LOSSES: list[tuple[str, LossSpec]] = [
    ("forward_kl", ForwardKL(temperature=2.0, weight=0.7)),
    ("reverse_kl", ReverseKL(weight=0.2)),
    ("cross_entropy", CrossEntropy(weight=1.5)),
]


class Model(nn.Module):
    """Embeddings, one layer, a head."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.body = nn.Linear(HIDDEN, HIDDEN)
        self.lm_head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def hidden(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.body(self.embed(ids)))

    def head(self) -> Head:
        return Head(self.lm_head, tuple(self.lm_head.parameters()))


def _plain(model: Model) -> None:
    pass


def _tied(model: Model) -> None:
    model.lm_head.weight = model.embed.weight


def _frozen(model: Model) -> None:
    model.lm_head.requires_grad_(False)


def _frozen_body(model: Model) -> None:
    model.embed.requires_grad_(False)
    model.body.requires_grad_(False)


def _lora(model: Model) -> None:
    get_peft_model(model, LoraConfig(r=3, target_modules=["lm_head", "body"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)


def _fake_quant(model: Model) -> None:
    prepare(model, Int8Channel(skip=("body",)))


def _fake_quant_lora(model: Model) -> None:
    prepare(model, Int8Channel(skip=()))
    _lora(model)
    absorb_lora(model)


every_head = pytest.mark.parametrize(
    "change", [_plain, _tied, _frozen, _frozen_body, _lora, _fake_quant, _fake_quant_lora]
)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    """ids, targets and mask of [3, 9]."""
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (3, 9), generator=random)
    return ids, ids.roll(-1, 1), torch.rand(3, 9, generator=random) < 0.6


def chunked(model: Model, batch: tuple[Tensor, Tensor, Tensor], chunk_tokens: int) -> tuple[Tensor, dict[str, Any]]:
    ids, targets, mask = batch
    teacher = Model(seed=7)
    signal = Signal(teacher.hidden(ids).detach(), teacher.head())
    return head_losses(model.hidden(ids), model.head(), signal, targets, mask, LOSSES, chunk_tokens=chunk_tokens)


def plain(model: Model, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    ids, targets, mask = batch
    teacher = Model(seed=7)
    logits, teacher_logits = model.lm_head(model.hidden(ids)), teacher.lm_head(teacher.hidden(ids)).detach()
    return sum((s.weight * s(logits, teacher_logits, targets, mask).sum for _, s in LOSSES), start=torch.zeros(()))


def gradients(model: Model) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


@every_head
@pytest.mark.parametrize("chunk_tokens", [1, 4, 1000])
def test_every_head_gets_its_gradient(
    change: Callable[[Model], None], chunk_tokens: int, batch: tuple[Tensor, Tensor, Tensor]
) -> None:
    model = Model()
    change(model)
    expected = plain(model, batch)
    expected.backward()
    theirs = gradients(model)
    model.zero_grad()
    total, _ = chunked(model, batch, chunk_tokens)
    total.backward()
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)
    for name, ours in gradients(model).items():
        trained = model.get_parameter(name).requires_grad
        assert (ours is not None) == trained == (theirs[name] is not None), name
        if trained:
            assert theirs[name].any(), name  # type: ignore[union-attr]
            torch.testing.assert_close(ours, theirs[name], rtol=1e-4, atol=1e-5)


@every_head
def test_autocast_loses_no_gradient(change: Callable[[Model], None], batch: tuple[Tensor, Tensor, Tensor]) -> None:
    """Autocast caches the cast weight; a cache filled where gradients are off would cut the head from the graph."""
    model = Model()
    change(model)
    found = []
    for chunk_tokens in (1000, 2):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                chunked(model, batch, chunk_tokens)
            total, _ = chunked(model, batch, chunk_tokens)
        total.backward()
        found.append(gradients(model))
    model.zero_grad()
    plain(model, batch).backward()
    for name, exact in gradients(model).items():
        if exact is not None:
            for rounded in found:
                assert rounded[name].dtype == torch.float32  # type: ignore[union-attr]
                error = (rounded[name] - exact).norm() / exact.norm()  # type: ignore[operator]
                assert error < 0.05, (name, error)


def test_logits_of_more_than_a_chunk_never_exist(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    ids, targets, mask = batch
    model, teacher = Model(), Model(seed=7)
    seen: dict[str, list[int]] = {"student": [], "teacher": []}
    model.lm_head.register_forward_hook(lambda _, inputs, out: seen["student"].append(inputs[0].shape[0]))
    teacher.lm_head.register_forward_hook(lambda _, inputs, out: seen["teacher"].append(inputs[0].shape[0]))
    signal = Signal(teacher.hidden(ids), teacher.head())
    head_losses(model.hidden(ids), model.head(), signal, targets, mask, LOSSES, chunk_tokens=4)
    count = int(mask.sum())
    sizes = [4] * (count // 4) + [count % 4] * (count % 4 > 0)
    assert seen == {"student": sizes, "teacher": sizes}


def test_the_teacher_gets_no_gradient(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    ids, targets, mask = batch
    model, teacher = Model(), Model(seed=7)
    signal = Signal(teacher.hidden(ids).detach(), teacher.head())
    head_losses(model.hidden(ids), model.head(), signal, targets, mask, LOSSES)[0].backward()
    assert all(p.grad is None for p in teacher.parameters())


def test_kl_is_reported_with_a_teacher_only_and_terms_are_unweighted(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    ids, targets, mask = batch
    model = Model()
    total, terms = chunked(model, batch, 5)
    assert list(terms) == ["forward_kl", "reverse_kl", "cross_entropy", KL]
    weighted = sum(spec.weight * terms[name].sum for name, spec in LOSSES)
    torch.testing.assert_close(total.detach(), weighted)
    assert not any(term.sum.requires_grad for term in terms.values())
    _, alone = head_losses(model.hidden(ids), model.head(), None, targets, mask, [LOSSES[2]])
    assert list(alone) == ["cross_entropy"]
    torch.testing.assert_close(alone["cross_entropy"].sum, terms["cross_entropy"].sum)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_none_are_computed(context: Callable[[], Any], batch: tuple[Tensor, Tensor, Tensor]) -> None:
    model = Model()
    expected, _ = chunked(model, batch, 4)
    graphs: list[bool] = []
    model.lm_head.register_forward_hook(lambda _, inputs, out: graphs.append(out.requires_grad))
    with context():
        total, _ = chunked(model, batch, 4)
    assert graphs
    assert not any(graphs)
    assert not total.requires_grad
    assert torch.equal(total, expected.detach())


def test_upstream_gradient_scales_and_accumulates(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    model = Model()
    chunked(model, batch, 4)[0].backward()
    once = gradients(model)
    model.zero_grad()
    total = chunked(model, batch, 4)[0] / 4
    total.backward(retain_graph=True)
    total.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(2 * gradient, once[name])  # type: ignore[operator]


def test_a_gradient_of_the_gradient_is_refused(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    model = Model()
    total, _ = chunked(model, batch, 4)
    (gradient,) = torch.autograd.grad(total**2, [model.lm_head.weight], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_bf16_weights_sum_their_chunks_in_fp32() -> None:
    torch.manual_seed(0)
    head, teacher = nn.Linear(16, 48).bfloat16(), nn.Linear(16, 48)
    hidden = torch.randn(1, 400, 16).bfloat16().requires_grad_()
    signal = Signal(torch.randn(1, 400, 16), Head(teacher))
    found = []
    for chunk_tokens in (1, 400):
        head.zero_grad()
        on = torch.ones(1, 400, dtype=torch.bool)
        arguments = (signal, on.long(), on, [LOSSES[0]])
        head_losses(hidden, Head(head, tuple(head.parameters())), *arguments, chunk_tokens=chunk_tokens)[0].backward()
        assert head.weight.grad.dtype == torch.bfloat16  # type: ignore[union-attr]
        found.append(head.weight.grad.float())  # type: ignore[union-attr]
    assert (found[0] - found[1]).norm() < 0.003 * found[1].norm()  # 0.018 when summed in bf16


def test_a_plain_head_is_multiplied_and_any_other_is_called() -> None:
    hidden, layer = torch.randn(2, 8), nn.Linear(8, 5)
    assert is_plain(layer, hidden)
    assert not is_plain(layer.forward, hidden)
    assert not is_plain(type("Other", (nn.Linear,), {})(8, 5), hidden)
    assert not is_plain(layer, hidden.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert is_plain(layer, hidden.bfloat16())
    for method in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"):
        handle = getattr(layer, method)(lambda *_: None)
        assert not is_plain(layer, hidden)
        handle.remove()
    layer.forward = lambda x: 2 * x  # type: ignore[method-assign]
    assert not is_plain(layer, hidden)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "autocast"])
def test_both_ways_through_a_head_agree(dtype: torch.dtype | None, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    ids, targets, mask = batch
    model, teacher = Model(), Model(seed=7)
    found = []
    for call in (model.lm_head, lambda hidden: model.lm_head(hidden)):
        model.zero_grad()
        signal = Signal(teacher.hidden(ids).detach(), teacher.head())
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            head = Head(call, tuple(model.lm_head.parameters()))
            total, _ = head_losses(model.hidden(ids), head, signal, targets, mask, LOSSES, chunk_tokens=4)
        total.backward()
        found.append((total.detach(), gradients(model)))
    (total, ours), (other, theirs) = found
    torch.testing.assert_close(total, other, rtol=1e-5, atol=1e-5)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-2 if dtype else 1e-5, atol=1e-2 if dtype else 1e-6)


def test_a_plain_head_makes_no_logits_of_more_than_a_chunk(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    class Largest(TorchDispatchMode):
        rows = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **kwargs or {})
            transposed = (HIDDEN, VOCABULARY)  # the weight, not logits
            if isinstance(out, Tensor) and out.shape[1:] == (VOCABULARY,) and out.shape != transposed:
                self.rows = max(self.rows, len(out))
            return out

    model = Model()
    with Largest() as largest:
        total, _ = chunked(model, batch, 4)
        total.backward()
    assert largest.rows == 4


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("way", ["multiplied", "called"])
def test_a_frozen_head_costs_no_gradient(way: str, trained: bool, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    """Not one that is thrown away either: it would be as large as the head."""

    class LikeTheHead(TorchDispatchMode):
        num_made = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **kwargs or {})
            known = {weight.data_ptr() for weight in weights}
            if isinstance(out, Tensor) and out.shape == (VOCABULARY, HIDDEN) and out.data_ptr() not in known:
                self.num_made += 1
            return out

    ids, targets, mask = batch
    model, teacher = Model(), Model(seed=7)
    model.lm_head.requires_grad_(trained)
    weights = (model.lm_head.weight, teacher.lm_head.weight)
    head = model.head() if way == "multiplied" else Head(lambda hidden: model.lm_head(hidden), model.head().parameters)
    hidden, signal = model.hidden(ids), Signal(teacher.hidden(ids).detach(), teacher.head())
    with LikeTheHead() as seen:
        total, _ = head_losses(hidden, head, signal, targets, mask, LOSSES, chunk_tokens=4)
        torch.autograd.grad(total, [hidden, *model.lm_head.parameters()] if trained else [hidden])
    assert (seen.num_made > 0) == trained


def test_a_second_backward_is_refused_unless_it_was_announced(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    total, _ = chunked(Model(), batch, 4)
    total.backward()
    with pytest.raises(RuntimeError, match="second time"):
        total.backward()
