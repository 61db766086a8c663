"""Reconstruction: least squares for the output projections of a pruned model, against those of the original model.

    W' = argmin_W  sum_tokens |W x + b - y|^2  +  r |W - W_cut|^2
       = (B + r W_cut) (A + r I)^-1 ,    A = sum x x^T,  B = sum y x^T,  r = ridge * trace(A) / channels

x is the input of a projection in the pruned model, y the output of the same projection in the original model, on the
kept hidden channels. For a projection with a bias, x and y are centred for the weight, and the bias is solved from
their means. The projections are solved in forward order (attention before the MLP of a layer), so each one compensates
for the error that remains in the layers before it. This is no training and uses no gradient; a few dozen sequences are
enough.

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
from distill.core.stop import stoppable
from distill.pruning.layout import Layout
from distill.pruning.observe import TokenMask, eval_mode, masked_batches

if TYPE_CHECKING:
    from torch import Tensor, nn

    from distill.pruning.observe import Batches
    from distill.pruning.plan import Plan


class ReconstructSpec(Spec):
    """Recompute the attention and MLP output projections after the cut, by least squares on the calibration set."""

    num_sequences: int = Field(64, ge=1)
    """Calibration sequences to use, at most data.calibration_sequences; both models read each of them twice per
    layer."""
    ridge: float = Field(0.01, gt=0)
    """Regularisation towards the weights after the cut, as a fraction of the inputs' mean square; increase it for few
    sequences."""


def reconstruct(
    pruned: nn.Module,
    original: nn.Module,
    plan: Plan,
    layout: Layout,
    batches: Batches,
    *,
    ridge: float,
    done: Callable[[None], None] = lambda _: None,
) -> tuple[float, float]:
    """Replace the output projections of ``pruned`` by the least-squares solution, in place; experts are not changed.

    Args:
        pruned: ``original`` after surgery by ``plan``, in float32.
        original: the unpruned model, on the same device.
        plan: which units stay; it must keep the whole vocabulary.
        layout: the layout of the architecture.
        batches: the calibration set, read once per projection; see :meth:`~distill.pruning.base.CriterionSpec.score`.
        ridge: regularisation towards the weight after the cut, as a fraction of the inputs' mean square; above 0.
        done: called after each projection.

    Returns:
        (relative error before, relative error after): the mean over the projections of sum |W x + b - y|^2 / sum |y|^2,
        each with the input at the time when it was solved.

    Raises:
        InputError: the plan cuts the vocabulary, so the models read different token ids; or the mask selects no token.
    """
    if plan.vocabulary is not None:
        raise InputError(
            "reconstruct needs the same token ids in both models, but keep.vocabulary cuts the vocabulary; "
            "cut the vocabulary in another prune stage"
        )
    batches = list(batches)
    before, after = [], []
    for path, new, old in stoppable(projections(plan, layout)):
        sums, new_path = _LeastSquares(), path.format(layer=new)
        for x, y in _input_output_pairs((pruned, new_path), (original, path.format(layer=old)), layout, batches):
            sums.add(x, y[:, list(plan.hidden_channels)])  # [tokens, in], [tokens, kept hidden channels]
        projection = _Projection(pruned.get_submodule(new_path), transposed=_is_transposed(layout, path))
        before.append(sums.error(*projection.get()))
        projection.set(*sums.solve(*projection.get(), ridge))
        after.append(sums.error(*projection.get()))
        done(None)
    return sum(before) / len(before), sum(after) / len(after)


def projections(plan: Plan, layout: Layout) -> list[tuple[str, int, int]]:
    """(path, layer of the pruned model, layer of the original model) of each output projection, in forward order."""
    paths = [path for path in (layout.attention_out, layout.mlp_down) if path is not None]
    return [(path, new, old) for new, old in enumerate(plan.layers) for path in paths]


def _is_transposed(layout: Layout, path: str) -> bool:
    """Whether the weight is stored as [in, out], as in GPT-2."""
    (axes,) = [row.axes for row in layout.parameters if row.path == f"{path}.weight"]
    return axes[0] != "hidden_channels"


class _StopForward(Exception):
    """Raised by a hook to end a forward pass early."""


@contextmanager
def _capture_at(model: nn.Module, path: str) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Inside the context, a forward pass ends after the module at ``path`` and appends (input, output) to the list."""
    seen: list[tuple[Tensor, Tensor]] = []

    def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append((args[0], output))
        raise _StopForward

    handle = model.get_submodule(path).register_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


def _input_output_pairs(
    pruned: tuple[nn.Module, str], original: tuple[nn.Module, str], layout: Layout, batches: Sequence[Any]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Per batch, the input of a module of the pruned model and the output of its counterpart in the original model.

    Yields:
        fp32 [unmasked tokens, in], [unmasked tokens, out].
    """
    import torch

    (small, new_path), (large, old_path) = pruned, original
    with (
        torch.no_grad(),
        eval_mode(small),
        eval_mode(large),
        _capture_at(small, new_path) as small_pass,
        _capture_at(large, old_path) as large_pass,
    ):
        for inputs, _, mask in masked_batches(small, batches, layout):
            for model in (small, large):
                with suppress(_StopForward):
                    model.get_submodule(layout.body)(**inputs, use_cache=False)
            tokens = TokenMask(mask, next(small.parameters()).device)
            x, y = tokens.apply(small_pass.pop()[0]), tokens.apply(large_pass.pop()[1])  # [batch, sequence, in / out]
            yield x[tokens.mask].float(), y[tokens.mask].float()


class _Projection:
    """The weight [out, in] and bias [out] of a linear module, whichever way the module stores its weight."""

    def __init__(self, module: Any, *, transposed: bool):
        self._module, self._transposed = module, transposed

    def get(self) -> tuple[Tensor, Tensor | None]:
        weight, bias = self._module.weight.detach().double(), self._module.bias
        return (weight.T if self._transposed else weight), (None if bias is None else bias.detach().double())

    def set(self, weight: Tensor, bias: Tensor | None) -> None:
        self._module.weight.data.copy_(weight.T if self._transposed else weight)
        if bias is not None:
            self._module.bias.data.copy_(bias)


class _LeastSquares:
    """The sums over tokens that the least-squares solution needs, in fp64."""

    def __init__(self) -> None:
        self.count = 0  # number of tokens
        self.xx: Any = 0.0  # A, [in, in]
        self.yx: Any = 0.0  # B, [out, in]
        self.x: Any = 0.0  # [in]
        self.y: Any = 0.0  # [out]
        self.yy: Any = 0.0  # sum |y|^2, scalar

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add inputs [tokens, in] and outputs [tokens, out]."""
        self.count += len(x)
        self.xx, self.yx = self.xx + (x.T @ x).double(), self.yx + (y.T @ x).double()
        self.x, self.y = self.x + x.double().sum(0), self.y + y.double().sum(0)
        self.yy = self.yy + y.double().square().sum()

    def solve(self, weight: Tensor, bias: Tensor | None, ridge: float) -> tuple[Tensor, Tensor | None]:
        """The weight [out, in] and bias [out] that minimise the regularised error.

        Args:
            weight: W_cut, towards which the solution is regularised.
            bias: the bias after the cut; None if there is none.
            ridge: as a fraction of the inputs' mean square.
        """
        import torch

        a, b = self.xx, self.yx
        if bias is not None:
            a, b = a - torch.outer(self.x, self.x) / self.count, b - torch.outer(self.y, self.x) / self.count
        # if all inputs are zero, any r > 0 returns the weight unchanged
        r = max(ridge * float(a.diagonal().mean()), torch.finfo(torch.float64).tiny)
        damped = a + r * torch.eye(len(a), dtype=a.dtype, device=a.device)
        solved = torch.linalg.solve(damped, (b + r * weight).T).T
        return solved, None if bias is None else (self.y - solved @ self.x) / self.count

    def error(self, weight: Tensor, bias: Tensor | None) -> float:
        """sum |W x + b - y|^2 / sum |y|^2, expanded so that only the sums are needed."""
        error = self.yy - 2 * (weight * self.yx).sum() + ((weight @ self.xx) * weight).sum()
        if bias is not None:
            error = error + 2 * bias @ (weight @ self.x - self.y) + self.count * bias @ bias
        return max(float(error), 0.0) / max(float(self.yy), 1e-300)
