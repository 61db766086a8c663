"""The budget of a smaller architecture, and its cost: counted exactly from its sizes, except for the decode time.

    parameters                  tied ones once
    non_embedding_parameters    the same without parameters that have a vocabulary dimension
    weight_bytes                parameters * bytes of the stored precision
    flops_per_token             2 * matrix entries used per token + 4 * context * heads * head_dim * layers
    decode_ms_per_token         measured on the machine that runs the search; see latency.py

FLOPs are those of one forward pass per token at the given context length. In a mixture of experts only the experts per
token are counted. An embedding lookup, norms and biases count as zero (Kaplan et al. 2020, arXiv 2001.08361,
section 2.1).
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Annotated, Literal, Protocol, get_args

from pydantic import AfterValidator, Field, model_validator

from distill.core.spec import Spec
from distill.pruning.layout import Config, Layout, Parameter, shape

Measure = Literal["parameters", "non_embedding_parameters", "weight_bytes", "flops_per_token", "decode_ms_per_token"]


def _amount(value: float | str) -> float | str:
    if isinstance(value, str):
        try:
            share = float(value.removesuffix("%")) if value.endswith("%") else 0.0
        except ValueError:
            share = 0.0
        if not 0 < share < 100:
            raise ValueError(f"expected a number, or a percentage of the model's value such as 50% (got {value!r})")
    elif value <= 0:
        raise ValueError(f"expected a number above 0, or a percentage such as 50% (got {value})")
    return value


Amount = Annotated[float | str, AfterValidator(_amount)]


def format_cost(measure: Measure, cost: float) -> str:
    """A cost as text: counts as integers, milliseconds with three decimals."""
    return f"{cost:,.3f}" if measure == "decode_ms_per_token" else f"{cost:,.0f}"


class SizeBudget(Spec):
    """The largest cost of the pruned model by one measure: a number, or a percentage of the original model's (50%)."""

    parameters: Amount | None = None
    """Total parameters, tied ones counted once. Null: another measure is the budget."""
    non_embedding_parameters: Amount | None = None
    """Parameters without the embedding and the output head. Null: another measure is the budget."""
    weight_bytes: Amount | None = None
    """Bytes of the weights as stored, without the file's header. Null: another measure is the budget."""
    flops_per_token: Amount | None = None
    """FLOPs of a forward pass per token, at a context of data.sequence_length. Null: another measure is the budget."""
    decode_ms_per_token: Amount | None = None
    """Milliseconds that this machine takes to decode one token at batch size 1, at the end of a context of
    data.sequence_length. Null: another measure is the budget."""
    tolerance: float = Field(0.05, ge=0, lt=1)
    """Fraction of the budget that may be left unused; 0.05 is the value of arXiv 2407.14679."""

    @model_validator(mode="after")
    def _one_measure(self) -> SizeBudget:
        given = [name for name in get_args(Measure) if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of {', '.join(get_args(Measure))} (got {', '.join(given) or 'none'})")
        return self

    @property
    def measure(self) -> Measure:
        """The measure of the budget."""
        found: Measure = next(name for name in get_args(Measure) if getattr(self, name) is not None)
        return found

    @property
    def is_time(self) -> bool:
        """Whether the cost is a time, which is estimated until it is measured."""
        return self.measure == "decode_ms_per_token"

    def bounds(self, original: float) -> tuple[float, float]:
        """(least, most) that a candidate may cost, where the original model costs ``original``."""
        amount: float | str = getattr(self, self.measure)
        most = original * float(amount.removesuffix("%")) / 100 if isinstance(amount, str) else amount
        return (1 - self.tolerance) * most, most


class Cost(Protocol):
    """The cost of architectures by one measure. It must not decrease when a size grows."""

    @property
    def measure(self) -> Measure:
        """The measure."""

    def of(self, sizes: Mapping[str, int]) -> float:
        """The cost of these axis sizes."""


class SizeCosts:
    """The cost of architectures by a measure that follows from their sizes.

    Args:
        measure: any but decode_ms_per_token.
        layout: the layout of the architecture.
        config: of the original model.
        context_tokens: length of the context that attention reads.
        bytes_per_parameter: of the stored precision.
    """

    def __init__(
        self, measure: Measure, layout: Layout, config: Config, *, context_tokens: int, bytes_per_parameter: int
    ):
        self.measure, self._context_tokens, self._bytes = measure, context_tokens, bytes_per_parameter
        self._rows = [row for row in layout.parameters if row.exists(config)]
        self._chosen_experts = config.get("num_experts_per_tok")
        ends = [row for row in self._rows if row.axes == ("vocabulary", "hidden_channels")]
        self._looked_up = ends[0] if len(ends) > 1 else None  # a tied one is the head too

    def of(self, sizes: Mapping[str, int]) -> float:
        """The cost of these axis sizes."""
        if self.measure == "flops_per_token":
            attention = 4 * self._context_tokens * sizes["attention_heads"] * sizes["head_dim"] * sizes["layers"]
            return 2 * sum(self._multiplied(row, sizes) for row in self._rows) + attention
        if self.measure == "non_embedding_parameters":
            return sum(_count(row, sizes) for row in self._rows if "vocabulary" not in row.axes)
        return sum(_count(row, sizes) for row in self._rows) * (self._bytes if self.measure == "weight_bytes" else 1)

    def _multiplied(self, row: Parameter, sizes: Mapping[str, int]) -> int:
        if row is self._looked_up or len(row.axes) == 1 or row.axes[0] in ("positions", "token_types"):
            return 0
        if row.axes[0] == "experts" and len(row.axes) == 3:
            return _count(row, {**sizes, "experts": self._chosen_experts or sizes["experts"]})
        return _count(row, sizes)


def _count(row: Parameter, sizes: Mapping[str, int]) -> int:
    return (sizes["layers"] if "{layer}" in row.path else 1) * prod(shape(row, sizes))
