"""The contract of a quantizer: a grid is codes and scale, one function of the weight for training and for shipping."""

from __future__ import annotations

import math
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
    """A weight on its grid: ``(values - zero_point) * scale``, group by group along a row.

    Attributes:
        values: int8 (float8_e4m3fn in the grid of fp8), [out_features, in_features].
        scale: [out_features, groups], in the type in which the grid stores it: see ``QuantizerSpec.scale_dtype``.
        zero_point: int8, [out_features, groups]; None for a grid that is symmetric about zero.
    """

    values: Tensor
    scale: Tensor
    zero_point: Tensor | None = None


class QuantizerSpec(Spec):
    """What every quantizer has: a kind, and the layers that it leaves alone."""

    scale_dtype: ClassVar[str] = "bfloat16"
    """Type of a stored scale: bfloat16 in the grids of compressed-tensors, float16 in those of GGUF."""

    keeps_zero: ClassVar[bool] = True
    """Whether a weight of zero stays zero, as a mask needs."""

    half_step: ClassVar[float] = 0.5
    """Half the distance between the last two codes: a weight so far beyond them is rounded, and does not clip."""

    kind: str
    skip: tuple[str, ...] = DEFAULT_SKIP
    """Linear layers left unquantized: patterns for a layer's dotted name or its last part; [] quantizes all."""
    include: tuple[str, ...] = ()
    """Embeddings quantized as well: patterns as in skip, such as [embed_tokens]; [] is none."""

    @property
    def clips(self) -> bool:
        """Whether weights may lie outside the range, so that :meth:`gradients` is asked and not just passed through."""
        return False

    @property
    def keeps_scale(self) -> bool:
        """Whether a scale can stay as it is while weights move under it, as ``rounding: gptq`` has them do."""
        return False

    def skips(self, name: str) -> bool:
        """Whether a layer of this dotted name stays as it is."""
        return any(matches(pattern, name) for pattern in self.skip)

    def without_layers(self) -> QuantizerSpec:
        """This grid, where layers are chosen for it and not by it.

        Raises:
            ValueError: it says which to skip or include, to no effect.
        """
        usual = type(self).model_fields  # a resolved recipe writes them out
        if idle := [key for key in ("include", "skip") if getattr(self, key) != usual[key].default]:
            raise ValueError(f"{', '.join(idle)} has no effect here; set it in the stage's quantizer")
        return self

    def label(self) -> str:
        """A few words for tables, such as "int4, group 32"."""
        raise NotImplementedError

    @property
    def gguf_type(self) -> str | None:
        """The GGUF tensor type that stores the codes as they are (``"Q8_0"``...), or None when there is none."""
        return None

    def compressed_tensors_arguments(self) -> dict[str, Any]:
        """The grid in the words of compressed-tensors' ``QuantizationArgs``.

        Raises:
            InputError: the format has no words for it.
        """
        raise InputError(f"quantizer {self.kind!r} cannot be stored as compressed-tensors; choose another quantizer")

    def groups(self, in_features: int) -> int:
        """How many scales one row of a weight has.

        Raises:
            InputError: the grid does not fit a row of this width.
        """
        raise NotImplementedError

    def quantize(self, weight: Tensor, scale: Tensor | None = None) -> Codes:
        """A weight's codes.

        Args:
            weight: [out_features, in_features], any float; computed in fp32.
            scale: [out_features, groups], to use in place of the weight's own; rounded to ``scale_dtype``.
        """
        raise NotImplementedError

    def initial_scale(self, weight: Tensor) -> Tensor | None:
        """Where a learned scale starts: fp32, [out_features, groups]; None when the scale is not learned."""
        return None

    def quantize_on(self, weight: Tensor, scale: Tensor, zero_point: Tensor | None) -> Codes:
        """A weight's codes on the scale and zero point of earlier codes, whatever the weight has become since."""
        return self.quantize(weight, scale)

    def limits(self) -> tuple[float, float] | None:
        """The lowest and the highest code; None: the grid has no end for its gradient."""
        return None

    def ends(self) -> tuple[float, float]:
        """Beyond which a weight clips that was within its own scale: half a step past the last codes, and what the
        rounding of a stored scale may add."""
        limits = self.limits()
        assert limits is not None
        low, high = (code + math.copysign(self.half_step, code) for code in limits)
        return low * (1 + 2**-8), high * (1 + 2**-8)

    def gradients(
        self, weight: Tensor, scale: Tensor, zero_point: Tensor | None, gradient: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients of the full-precision weight and, where it is learned, of the logarithm of its scale.

        Args:
            weight: [out_features, in_features].
            scale: of its codes.
            zero_point: of its codes.
            gradient: of the dequantized weight, [out_features, in_features].
        """
        if self.limits() is None:
            return gradient, None
        low, high = self.ends()
        exact = weight.float().unflatten(-1, (scale.shape[-1], -1)) * reciprocal(scale.float()).unsqueeze(-1)
        inside = (exact >= low) & (exact <= high)
        return gradient * inside.flatten(-2), None

    def dequantize(self, codes: Codes) -> Tensor:
        """The weight that codes stand for: fp32, [out_features, in_features].

        The product of 8-bit codes and scales of 8 or 11 bits is exact in fp32.
        """
        grouped = codes.values.float().unflatten(-1, (codes.scale.shape[-1], -1))
        if codes.zero_point is not None:
            grouped = grouped - codes.zero_point.float().unsqueeze(-1)
        return (grouped * codes.scale.float().unsqueeze(-1)).flatten(-2)


def matches(pattern: str, name: str) -> bool:
    """Whether a shell-style pattern fits a dotted module name or its last part."""
    return fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[2], pattern)


def count_groups(in_features: int, group_size: int) -> int:
    """in_features / group_size.

    Raises:
        InputError: group_size does not divide in_features.
    """
    if in_features % group_size:
        raise InputError(
            f"group_size ({group_size}) must divide in_features ({in_features})" + _proposal(in_features, group_size)
        )
    return in_features // group_size


def _proposal(in_features: int, wanted: int) -> str:
    """``"; try 32 or 64"``: the nearest divisors on both sides of those that engines and formats have, 32 times 1, 2,
    4, ..."""
    divisors = [size for power in range(5, 16) if in_features % (size := 2**power) == 0]
    below, above = [d for d in divisors if d < wanted][-1:], [d for d in divisors if d > wanted][:1]
    if found := " or ".join(str(size) for size in below + above):
        return f"; try {found}"
    return (
        "; no group of 32 or more fits, as engines need: skip the layer, use int8_channel or prune to a multiple of 32"
    )
