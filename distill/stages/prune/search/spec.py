"""Settings of a search: the budget, which sizes may be reduced, and how many candidates are measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field, PositiveInt, model_validator

from distill.core.spec import Spec
from distill.data.spec import DataSpec
from distill.pruning.budget import SizeBudget, SizeCosts
from distill.pruning.keep import KeepSpec
from distill.pruning.search import Candidate, SearchSpace, SizeKey
from distill.training.spec import BudgetSpec

if TYPE_CHECKING:
    from distill.pruning.layout import Config, Layout


class ShortTraining(BudgetSpec):
    """How the best candidates are trained before one of them is chosen: on the uncut model's logits, by forward KL."""

    num_candidates: int = Field(3, ge=2)
    """Number of candidates to train, the best by measurement."""


class SearchSpec(Spec):
    """Which architectures to search for a budget, and how many of them to measure."""

    budget: SizeBudget
    """Largest cost of the pruned model, such as {non_embedding_parameters: 50%}."""
    axes: tuple[SizeKey, ...] = Field(("hidden_size", "intermediate_size", "num_hidden_layers"), min_length=1)
    """Sizes that may be reduced. Other sizes are kept."""
    multiple_of: dict[SizeKey, PositiveInt] = Field({})
    """Step of each size. Default: 64 for hidden_size and intermediate_size, the number of KV groups for
    num_attention_heads (if groups are not pruned), else 1. The unpruned size is always allowed."""
    smallest_share: float = Field(0.5, gt=0, le=1)
    """Smallest value of each size, as a fraction of the model's."""
    layer_choice: Literal["lowest", "contiguous"] = "lowest"
    """Which layers are dropped. lowest: the layers with the lowest scores; contiguous: the block of neighbouring layers
    with the lowest sum."""
    num_sequences: int = Field(32, ge=1)
    """Number of calibration sequences on which each candidate is measured, at most data.calibration_sequences."""
    num_measured: int = Field(16, ge=1)
    """Number of candidates that are pruned and measured, the best by estimate."""
    train: ShortTraining | None = None
    """Training of the best candidates before one is chosen, such as {num_tokens: 1e6}; null: choose directly after
    pruning."""

    @model_validator(mode="after")
    def _each_round_is_narrower(self) -> SearchSpec:
        if len({*self.axes}) < len(self.axes):
            raise ValueError(f"axes names one twice (got {', '.join(self.axes)})")
        if strange := [key for key in self.multiple_of if key not in self.axes]:
            raise ValueError(f"multiple_of.{strange[0]} has no effect: axes does not name it")
        if self.layer_choice != "lowest" and "num_hidden_layers" not in self.axes:
            raise ValueError(f"layer_choice {self.layer_choice!r} has no effect: axes does not name num_hidden_layers")
        if self.train is not None and self.train.num_candidates > self.num_measured:
            raise ValueError(
                f"train.num_candidates ({self.train.num_candidates}) is more than num_measured ({self.num_measured})"
            )
        return self

    def space(self, layout: Layout, config: Config) -> SearchSpace:
        """The architectures of the search.

        Raises:
            InputError: see :class:`~distill.pruning.search.SearchSpace`.
        """
        return SearchSpace(layout, config, self.axes, self.multiple_of, self.smallest_share)

    def costs(self, layout: Layout, config: Config, *, sequence_length: int, dtype: str) -> SizeCosts:
        """What architectures cost by the budget's measure, stored as ``dtype``; for a time the FLOPs behind it."""
        size = 2 if dtype in ("bfloat16", "float16") else 4
        measure = "flops_per_token" if self.budget.is_time else self.budget.measure
        return SizeCosts(measure, layout, config, context_tokens=sequence_length, bytes_per_parameter=size)

    def candidates(self, space: SearchSpace, costs: SizeCosts) -> list[Candidate]:
        """The architectures that fit the budget.

        Raises:
            InputError: there are none.
        """
        return space.candidates(costs, *self.budget.bounds(costs.of(space.before)))

    def architectures(self, layout: Layout, config: Config, sequence_length: int, dtype: str) -> list[Candidate]:
        """The architectures of a model, stored as ``dtype``, that fit the budget.

        Raises:
            InputError: there are none.
        """
        costs = self.costs(layout, config, sequence_length=sequence_length, dtype=dtype)
        return self.candidates(self.space(layout, config), costs)

    def in_words(self) -> str:
        """What is searched, as far as that is known without the model."""
        return f"searches {', '.join(self.axes)} for {self._asked()}"

    def told(self, layout: Layout, config: Config, data: DataSpec, dtype: str) -> str:
        """What is searched in a model, how many candidates there are, and what becomes of them.

        Raises:
            InputError: none fits the budget.
        """
        grid = ", ".join(f"{key} {_range(sizes)}" for key, sizes in self.space(layout, config).grid.items())
        if self.budget.is_time:
            return f"searches {grid} for {self._asked()}, measured on this machine"
        num = len(self.architectures(layout, config, data.sequence_length, dtype))
        rounds = [f"measures {min(num, self.num_measured)} of them"]
        if self.train is not None:
            budget = self.train.budget_in_words(data.sequence_length, data.packing)
            rounds.append(f"trains {min(num, self.train.num_candidates)} on {budget}")
        return f"searches {grid}; {num:,} candidates with {self._asked()}; {', '.join(rounds)}"

    def _asked(self) -> str:
        return f"{self.budget.measure} at most {getattr(self.budget, self.budget.measure)}"

    def keep(self, sizes: dict[str, int]) -> KeepSpec:
        """Sizes as a recipe would state them."""
        where = {"layer_choice": self.layer_choice} if "num_hidden_layers" in sizes else {}
        return KeepSpec.model_validate({**sizes, **where})


def _range(sizes: Sequence[int]) -> str:
    return f"{sizes[0]} to {sizes[-1]} ({len(sizes)} sizes)" if len(sizes) > 1 else f"{sizes[0]} alone"
