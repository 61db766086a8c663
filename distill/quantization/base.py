"""The contract of a quantizer: a grid is codes and scale, one function of the weight for training and for shipping."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, ClassVar

from distill.core.spec import Spec

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT_SKIP = ("lm_head",)


@dataclass(frozen=True)
class Codes:
    """A weight on its grid.

    Attributes:
        values: int8, [out_features, in_features].
        scale: bfloat16, [out_features, groups]; the weight is ``values * scale``, group by group along a row.
    """

    values: Tensor
    scale: Tensor


class QuantizerSpec(Spec):
    """What every quantizer has: a kind, and the layers that it leaves alone."""

    bits: ClassVar[int]

    kind: str
    skip: tuple[str, ...] = DEFAULT_SKIP
    """Linear layers left unquantized: patterns for a layer's dotted name or its last part; [] quantizes all."""

    def skips(self, name: str) -> bool:
        """Whether a layer of this dotted name stays as it is."""
        return any(matches(pattern, name) for pattern in self.skip)

    def label(self) -> str:
        """A few words for tables, such as "int4, group 32"."""
        raise NotImplementedError

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
            scale: [out_features, groups], to use in place of the weight's own.
        """
        raise NotImplementedError

    def dequantize(self, codes: Codes) -> Tensor:
        """The weight that codes stand for: fp32, [out_features, in_features]."""
        raise NotImplementedError


def matches(pattern: str, name: str) -> bool:
    """Whether a shell-style pattern fits a dotted module name or its last part."""
    return fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[2], pattern)


def symmetric_quantize(weight: Tensor, *, bits: int, groups: int, scale: Tensor | None = None) -> Codes:
    """Codes of a grid that is symmetric about zero.

        scale  = bfloat16(max|w| / ((2^bits - 1) / 2))
        values = clamp(round_half_even(w / scale), -2^(bits-1), 2^(bits-1) - 1)

    This is the grid of compressed-tensors and torchao. The scale is rounded to the type in which it is stored *before*
    it divides: an engine that holds the model in bfloat16 reads the very scale that the codes were made with. A group
    of zeros has scale 1.

    Quantizing the result again gives the same codes only with the same scale: the largest code, 2^(bits-1) - 1 or
    -2^(bits-1), is not (2^bits - 1) / 2, so a second absolute maximum gives another scale. Never quantize a
    dequantized weight anew.

    Args:
        weight: [out_features, in_features].
        bits: width of a code, 2 to 8.
        groups: scales in a row; must divide in_features.
        scale: [out_features, groups], in place of the weight's own.
    """
    grouped = weight.detach().float().unflatten(-1, (groups, -1))
    if scale is None:
        largest = grouped.abs().amax(-1)
        # a divisor on the tensor's device: CUDA multiplies by the reciprocal of a plain number, which rounds otherwise
        scale = (largest / largest.new_full((), (2**bits - 1) / 2)).bfloat16()
        scale = scale.masked_fill(scale == 0, 1.0)
    limit = 2 ** (bits - 1)
    values = (grouped / scale.float().unsqueeze(-1)).round().clamp(-limit, limit - 1)
    return Codes(values.flatten(-2).char(), scale)


def symmetric_dequantize(codes: Codes) -> Tensor:
    """``values * scale`` in fp32, where the product of 8-bit codes and bfloat16 scales is exact."""
    grouped = codes.values.float().unflatten(-1, (codes.scale.shape[-1], -1))
    return (grouped * codes.scale.float().unsqueeze(-1)).flatten(-2)
