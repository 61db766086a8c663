"""The interface of a quantizer: one function maps a weight to codes and scales, in training and in the stored model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, ClassVar

from distill.core.errors import InputError
from distill.core.spec import Spec
from distill.quantization.blocks import reciprocal

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT_SKIP = ("lm_head",)


@dataclass(frozen=True)
class Codes:
    """A quantized weight: ``(values - zero_point) * scale``, per group of neighbouring weights in a row.

    Attributes:
        values: int8 (float8_e4m3fn for fp8), [out_features, in_features].
        scale: [out_features, groups], in the type in which it is stored: see ``QuantizerSpec.scale_dtype``.
        zero_point: int8, [out_features, groups]; None for a grid that is symmetric about zero.
    """

    values: Tensor
    scale: Tensor
    zero_point: Tensor | None = None


class QuantizerSpec(Spec):
    """Base class of the quantizers."""

    scale_dtype: ClassVar[str] = "bfloat16"
    """Type of a stored scale: bfloat16 in compressed-tensors, float16 in GGUF."""

    keeps_zero: ClassVar[bool] = True
    """Whether a weight of zero is quantized to zero, as sparsity masks need."""

    half_step: ClassVar[float] = 0.5
    """Half the distance between the two largest codes: a weight within this distance of the last code is rounded to it
    and not clipped."""

    kind: str
    skip: tuple[str, ...] = DEFAULT_SKIP
    """Linear layers that are not quantized: patterns for a layer's dotted name or its last part; [] quantizes all."""
    include: tuple[str, ...] = ()
    """Embeddings to quantize as well: patterns as in skip, such as [embed_tokens]; [] quantizes none."""

    @property
    def clips(self) -> bool:
        """Whether weights can be outside the range, so that :meth:`gradients` is not just the straight-through one."""
        return False

    @property
    def is_by_row(self) -> bool:
        """Whether the codes of a row depend on that row alone, so that rows can be quantized one by one."""
        return True

    @property
    def keeps_scale(self) -> bool:
        """Whether a weight can be quantized with a given scale, as ``rounding: gptq`` needs."""
        return False

    def skips(self, name: str) -> bool:
        """Whether the layer with this dotted name is not quantized."""
        return any(matches(pattern, name) for pattern in self.skip)

    def without_layers(self) -> QuantizerSpec:
        """This quantizer, for a place where ``skip`` and ``include`` have no effect.

        Raises:
            ValueError: ``skip`` or ``include`` is set.
        """
        defaults = type(self).model_fields  # a resolved recipe contains the defaults
        if unused := [key for key in ("include", "skip") if getattr(self, key) != defaults[key].default]:
            raise ValueError(f"{', '.join(unused)} has no effect here; set it in the stage's quantizer")
        return self

    def label(self) -> str:
        """Short text for tables, such as "int4, group 32"."""
        raise NotImplementedError

    @property
    def gguf_type(self) -> str | None:
        """The GGUF tensor type that can store the codes without change (``"Q8_0"``...), or None."""
        return None

    def compressed_tensors_arguments(self) -> dict[str, Any]:
        """The arguments of compressed-tensors' ``QuantizationArgs`` that describe the grid.

        Raises:
            InputError: the format cannot store this grid.
        """
        raise InputError(f"quantizer {self.kind!r} cannot be stored as compressed-tensors; choose another quantizer")

    def groups(self, in_features: int) -> int:
        """Number of scales per row of a weight.

        Raises:
            InputError: the group size does not divide ``in_features``.
        """
        raise NotImplementedError

    def quantize(self, weight: Tensor, scale: Tensor | None = None) -> Codes:
        """Quantize a weight.

        Args:
            weight: [out_features, in_features], any float type; the computation is in fp32.
            scale: [out_features, groups], used instead of a scale computed from the weight; rounded to ``scale_dtype``.
        """
        raise NotImplementedError

    def initial_scale(self, weight: Tensor) -> Tensor | None:
        """Initial value of a learned scale: fp32, [out_features, groups]; None if the scale is not learned."""
        return None

    def quantize_on(self, weight: Tensor, scale: Tensor, zero_point: Tensor | None) -> Codes:
        """Quantize a weight with the scale and zero point of earlier codes."""
        return self.quantize(weight, scale)

    def limits(self) -> tuple[float, float] | None:
        """The lowest and the highest code; None if the gradient passes everywhere."""
        return None

    def ends(self) -> tuple[float, float]:
        """The range, in units of the scale, outside of which a weight is clipped.

        Half a step beyond the last codes, widened by the largest rounding error of a bfloat16 scale.
        """
        limits = self.limits()
        assert limits is not None
        low, high = (code + math.copysign(self.half_step, code) for code in limits)
        return low * (1 + 2**-8), high * (1 + 2**-8)

    def gradients(
        self, weight: Tensor, scale: Tensor, zero_point: Tensor | None, gradient: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients with respect to the full-precision weight and, if it is learned, to the logarithm of its scale.

        Args:
            weight: [out_features, in_features].
            scale: of its codes, [out_features, groups].
            zero_point: of its codes, [out_features, groups], or None.
            gradient: with respect to the dequantized weight, [out_features, in_features].

        Returns:
            [out_features, in_features], and [out_features, groups] or None.
        """
        if self.limits() is None:
            return gradient, None
        low, high = self.ends()
        # [out_features, groups, weights per group]
        exact = weight.float().unflatten(-1, (scale.shape[-1], -1)) * reciprocal(scale.float()).unsqueeze(-1)
        inside = (exact >= low) & (exact <= high)
        return gradient * inside.flatten(-2), None

    def dequantize(self, codes: Codes) -> Tensor:
        """The weight that the codes represent: fp32, [out_features, in_features].

        The result is exact: fp32 holds the product of an 8-bit code and a scale with 8 or 11 significant bits.
        """
        grouped = codes.values.float().unflatten(-1, (codes.scale.shape[-1], -1))  # [out_features, groups, per group]
        if codes.zero_point is not None:
            grouped = grouped - codes.zero_point.float().unsqueeze(-1)
        return (grouped * codes.scale.float().unsqueeze(-1)).flatten(-2)


def matches(pattern: str, name: str) -> bool:
    """Whether a shell-style pattern fits a dotted module name or its last part."""
    return fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[2], pattern)


Layers = Sequence[tuple[str, "QuantizerSpec"]]
"""Quantizers for single layers: (pattern as in skip, quantizer); the first pattern that matches decides."""


def grid_of(name: str, spec: QuantizerSpec, layers: Layers) -> QuantizerSpec:
    """The quantizer of a layer that is not skipped."""
    return next((grid for pattern, grid in layers if matches(pattern, name)), spec)


def count_groups(in_features: int, group_size: int) -> int:
    """in_features / group_size.

    Raises:
        InputError: group_size does not divide in_features.
    """
    if in_features % group_size:
        raise InputError(
            f"group_size ({group_size}) must divide in_features ({in_features})"
            + _suggest_group_sizes(in_features, group_size)
        )
    return in_features // group_size


def _suggest_group_sizes(in_features: int, wanted: int) -> str:
    """``"; try 32 or 64"``: the nearest smaller and larger group sizes that engines have (32, 64, 128, ...) and that
    divide ``in_features``."""
    divisors = [size for power in range(5, 16) if in_features % (size := 2**power) == 0]
    below, above = [d for d in divisors if d < wanted][-1:], [d for d in divisors if d > wanted][:1]
    if found := " or ".join(str(size) for size in below + above):
        return f"; try {found}"
    return (
        "; no group size of 32 or more divides it, and engines need at least 32: skip the layer, use int8_channel, or "
        "prune to a multiple of 32"
    )
