"""Reconstruction: the output projections of a pruned model, solved anew to give what the whole model's gave.

    W' = argmin_W  sum_tokens |W x + b - y|^2  +  r |W - W_cut|^2
       = (B + r W_cut) (A + r I)^-1 ,    A = sum x x^T,  B = sum y x^T,  r = ridge * trace(A) / channels

x is what enters a projection of the pruned model, y what leaves the same projection of the whole one, on the hidden
channels that stay. A projection with a bias is solved about the means of x and y, and its bias takes what they leave.
One after the other, from the first layer up and attention before the MLP, so that each makes up for what is still wrong
below it. No training, and no gradient; a few dozen sequences will do.

When to prefer it: the student is to be used, or compared with others, right after the cut. A long distillation finds
the same weights and better ones.

Source: least squares on the outputs of a pruned layer is He et al. 2017, arXiv 1707.06168, section 3.1; the ridge
towards the cut weight is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from pydantic import Field

from distill.core.errors import InputError
from distill.core.spec import Spec
from distill.pruning.layout import Layout
from distill.pruning.watch import Counted, evaluating, prepared

if TYPE_CHECKING:
    from torch import Tensor, nn

    from distill.pruning.plan import Plan
    from distill.pruning.watch import Batches


class ReconstructSpec(Spec):
    """Solve attention and MLP output projections anew after the cut, by least squares on the calibration set."""

    num_sequences: int = Field(64, ge=1)
    """Calibration sequences to solve on, at most data.calibration_sequences; each is read twice a layer, by both
    models."""
    ridge: float = Field(0.01, gt=0)
    """Pull towards the weights as cut, as a share of the inputs' mean square; the fewer sequences, the more."""


def reconstruct(
    pruned: nn.Module,
    whole: nn.Module,
    plan: Plan,
    layout: Layout,
    batches: Batches,
    *,
    ridge: float,
    done: Callable[[None], None] = lambda _: None,
) -> tuple[float, float]:
    """Solve the output projections of ``pruned`` anew, in place; experts stay as they are.

    Args:
        pruned: what surgery made of ``whole`` by ``plan``, in float32.
        whole: the unpruned model, on the same device.
        plan: what stays; with the whole vocabulary.
        layout: the layout of the architecture.
        batches: of the calibration set, read again for each projection; see
            :meth:`~distill.pruning.base.CriterionSpec.score`.
        ridge: pull towards the cut weight, as a share of the inputs' mean square; above 0.
        done: called after each projection.

    Returns:
        The error before and after, as a share of what the whole model's projections put out: the mean over all of
        sum |W x + b - y|^2 / sum |y|^2, each with the inputs that it had when it was solved.

    Raises:
        InputError: the vocabulary is cut, so that the two models cannot read the same tokens; or no token counts.
    """
    if plan.vocabulary is not None:
        raise InputError(
            "reconstruct: a model with a cut vocabulary reads other tokens; cut the vocabulary in a stage of its own"
        )
    batches = list(batches)
    before, after = [], []
    for path, new, old in projections(plan, layout):
        sums, new_path = _Sums(), path.format(layer=new)
        for given, wanted in _paired((pruned, new_path), (whole, path.format(layer=old)), layout, batches):
            sums.add(given, wanted[:, list(plan.hidden_channels)])
        projection = _Projection(pruned.get_submodule(new_path), transposed=_is_transposed(layout, path))
        before.append(sums.error(*projection.get()))
        projection.set(*sums.solve(*projection.get(), ridge))
        after.append(sums.error(*projection.get()))
        done(None)
    return sum(before) / len(before), sum(after) / len(after)


def projections(plan: Plan, layout: Layout) -> list[tuple[str, int, int]]:
    """(path, layer of the pruned model, layer of the whole one), in the order in which a forward pass meets them."""
    paths = [path for path in (layout.attention_out, layout.mlp_down) if path is not None]
    return [(path, new, old) for new, old in enumerate(plan.layers) for path in paths]


def _is_transposed(layout: Layout, path: str) -> bool:
    """Whether the weight is [in, out], as in GPT-2."""
    (axes,) = [row.axes for row in layout.parameters if row.path == f"{path}.weight"]
    return axes[0] != "hidden_channels"


class _Reached(Exception):
    """The module has been passed; what comes after it is not computed."""


@contextmanager
def _ending_at(model: nn.Module, path: str) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """While it lasts a forward pass ends at a module and leaves what entered and left it."""
    seen: list[tuple[Tensor, Tensor]] = []

    def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append((args[0], output))
        raise _Reached

    handle = model.get_submodule(path).register_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


def _paired(
    pruned: tuple[nn.Module, str], whole: tuple[nn.Module, str], layout: Layout, batches: Sequence[Any]
) -> Iterator[tuple[Tensor, Tensor]]:
    """What enters a module of the one and leaves a module of the other, for each batch: [tokens that count, width]."""
    import torch

    (small, new_path), (large, old_path) = pruned, whole
    with (
        torch.no_grad(),
        evaluating(small),
        evaluating(large),
        _ending_at(small, new_path) as given,
        _ending_at(large, old_path) as wanted,
    ):
        for inputs, mask in prepared(small, batches):
            for model in (small, large):
                with suppress(_Reached):
                    model.get_submodule(layout.body)(**inputs, use_cache=False)
            counts = Counted(mask, next(small.parameters()).device)
            x, y = counts.of(given.pop()[0]), counts.of(wanted.pop()[1])
            yield x[counts.mask].float(), y[counts.mask].float()


class _Projection:
    """The weight [out, in] and bias of a linear map, however its module keeps them."""

    def __init__(self, module: Any, *, transposed: bool):
        self._module, self._transposed = module, transposed

    def get(self) -> tuple[Tensor, Tensor | None]:
        weight, bias = self._module.weight.detach().double(), self._module.bias
        return (weight.T if self._transposed else weight), (None if bias is None else bias.detach().double())

    def set(self, weight: Tensor, bias: Tensor | None) -> None:
        self._module.weight.data.copy_(weight.T if self._transposed else weight)
        if bias is not None:
            self._module.bias.data.copy_(bias)


class _Sums:
    """What least squares needs of all tokens, in fp64: A, B, the sums of x and y, that of y^2, and how many."""

    def __init__(self) -> None:
        self.count = 0
        self.xx: Any = 0.0
        self.yx: Any = 0.0
        self.x: Any = 0.0
        self.y: Any = 0.0
        self.yy: Any = 0.0

    def add(self, x: Tensor, y: Tensor) -> None:
        self.count += len(x)
        self.xx, self.yx = self.xx + (x.T @ x).double(), self.yx + (y.T @ x).double()
        self.x, self.y = self.x + x.double().sum(0), self.y + y.double().sum(0)
        self.yy = self.yy + y.double().square().sum()

    def solve(self, weight: Tensor, bias: Tensor | None, ridge: float) -> tuple[Tensor, Tensor | None]:
        """The weight and bias of the least error."""
        import torch

        a, b = self.xx, self.yx
        if bias is not None:
            a, b = a - torch.outer(self.x, self.x) / self.count, b - torch.outer(self.y, self.x) / self.count
        # Of inputs that are all zero nothing can be learnt, and any pull leaves the weight as it is.
        pull = max(ridge * float(a.diagonal().mean()), torch.finfo(torch.float64).tiny)
        damped = a + pull * torch.eye(len(a), dtype=a.dtype, device=a.device)
        solved = torch.linalg.solve(damped, (b + pull * weight).T).T
        return solved, None if bias is None else (self.y - solved @ self.x) / self.count

    def error(self, weight: Tensor, bias: Tensor | None) -> float:
        """Sum of |W x + b - y|^2 as a share of that of |y|^2."""
        error = self.yy - 2 * (weight * self.yx).sum() + ((weight @ self.xx) * weight).sum()
        if bias is not None:
            error = error + 2 * bias @ (weight @ self.x - self.y) + self.count * bias @ bias
        return max(float(error), 0.0) / max(float(self.yy), 1e-300)
