"""Integer grids: symmetric and asymmetric codes, and where their scale comes from.

    symmetric:   scale = max|w| / ((2^b - 1) / 2)          values = clamp(round(w / scale), low, high)
    asymmetric:  scale = (max(w, 0) - min(w, 0)) / (2^b - 1)   values = clamp(round(w / scale) + zero_point, low, high)
                 zero_point = clamp(round(low - min(w, 0) / scale), low, high)

with low = -2^(b-1), high = 2^(b-1) - 1 and halves rounded to even: the grid of compressed-tensors and torchao. The
scale is rounded to the type in which it is stored *before* it divides: an engine that holds the model in bfloat16
reads the very scale that the codes were made with. A group of zeros has scale 1.

Quantizing the result again gives the same codes only with the same scale: the largest code, 2^(b-1) - 1 or -2^(b-1), is
not (2^b - 1) / 2, so a second absolute maximum gives another scale. Never quantize a dequantized weight anew.

A learned scale starts where the squared error is least. With v = w / scale its gradient is, in a group of N weights,

    d scale = sum_i d w_i * (low if v_i <= low else high if v_i >= high else round(v_i) - v_i) / sqrt(N * high)

while the weight's own passes where low <= v <= high. What is learned is log(scale), and it is given this gradient as it
stands, without the factor of the chain rule: Adam's step would not depend on it but where it drowns in epsilon. The
source starts at 2 mean|w| / sqrt(high), which suits trainings that are long enough to leave it.

Source: Esser et al. 2019, arXiv 1902.08153, sections 2.1 and 2.2 (learned scales).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from distill.quantization.base import Codes, QuantizerSpec

if TYPE_CHECKING:
    from torch import Tensor

CLIP_RATIOS = tuple(1 - step / 20 for step in range(16))


class IntegerSpec(QuantizerSpec):
    """An integer grid of some width whose scale is taken from the weight, searched or learned."""

    scale: Literal["absmax", "mse", "learned"] = "absmax"
    """From the largest weight; by searching the range with the least squared error (anew at every step of a training,
    so rather for rounding); or learned with the weights (LSQ, for 4 bits and below)."""

    def num_bits(self) -> int:
        """Width of a code."""
        raise NotImplementedError

    def symmetric(self) -> bool:
        """Whether the grid is symmetric about zero."""
        return True

    @property
    def keeps_scale(self) -> bool:
        return self.symmetric()

    def limits(self) -> tuple[int, int]:
        """The lowest and the highest code."""
        return -(2 ** (self.num_bits() - 1)), 2 ** (self.num_bits() - 1) - 1

    def compressed_tensors_arguments(self) -> dict[str, Any]:
        """Width and symmetry; a subclass adds what shares a scale."""
        return {"num_bits": self.num_bits(), "type": "int", "symmetric": self.symmetric(), "dynamic": False}

    @property
    def clips(self) -> bool:
        return self.scale != "absmax"

    def initial_scale(self, weight: Tensor) -> Tensor | None:
        if self.scale != "learned":
            return None
        grouped = weight.detach().float().unflatten(-1, (self.groups(weight.shape[-1]), -1))
        return self._searched(grouped)[0].float()

    def gradients(
        self, weight: Tensor, scale: Tensor, zero_point: Tensor | None, gradient: Tensor
    ) -> tuple[Tensor, Tensor]:
        low, high = self.limits()
        groups = scale.shape[-1]
        upstream = gradient.float().unflatten(-1, (groups, -1))
        exact = weight.float().unflatten(-1, (groups, -1)) / scale.float().unsqueeze(-1)
        if zero_point is not None:
            exact = exact + zero_point.float().unsqueeze(-1)
        lowest, highest = (low, high) if self.clips else self.ends()  # LSQ ends at the last code itself
        inside = (exact >= lowest) & (exact <= highest)
        to_scale = upstream * (exact.round() - exact).where(inside, exact.clamp(low, high))
        to_weight = (upstream * inside).flatten(-2).to(weight.dtype)
        return to_weight, to_scale.sum(-1) / (exact.shape[-1] * high) ** 0.5

    def quantize(self, weight: Tensor, scale: Tensor | None = None) -> Codes:
        scale = self.initial_scale(weight) if scale is None else scale
        groups = self.groups(weight.shape[-1]) if scale is None else scale.shape[-1]
        grouped = weight.detach().float().unflatten(-1, (groups, -1))
        if scale is not None:
            return self._codes(grouped, *self._stored(grouped, scale.float()))
        if self.scale == "mse":
            return self._codes(grouped, *self._searched(grouped))
        return self._codes(grouped, *self._stored(grouped, self._widest(grouped)))

    def quantize_on(self, weight: Tensor, scale: Tensor, zero_point: Tensor | None) -> Codes:
        return self._codes(weight.detach().float().unflatten(-1, (scale.shape[-1], -1)), scale, zero_point)

    def _widest(self, grouped: Tensor) -> Tensor:
        """The fp32 scale whose range holds every weight: [out_features, groups]."""
        low, high = self.limits()
        if self.symmetric():
            extent, steps = grouped.abs().amax(-1), (high - low) / 2
        else:
            extent, steps = grouped.amax(-1).clamp(min=0) - grouped.amin(-1).clamp(max=0), float(high - low)
        # a divisor on the tensor's device: CUDA multiplies by the reciprocal of a plain number, which rounds otherwise
        return extent / extent.new_full((), steps)

    def _stored(self, grouped: Tensor, scale: Tensor, clip: float = 1.0) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point as they are stored; ``clip`` narrows the range that the zero point is for."""
        scale = scale.bfloat16()
        scale = scale.masked_fill(scale == 0, 1.0)
        if self.symmetric():
            return scale, None
        low, high = self.limits()
        start = low - grouped.amin(-1).clamp(max=0) * clip / scale.float()
        return scale, start.round().clamp(low, high).char()

    def _codes(self, grouped: Tensor, scale: Tensor, zero_point: Tensor | None) -> Codes:
        low, high = self.limits()
        values = (grouped / scale.float().unsqueeze(-1)).round()
        if zero_point is not None:
            values = values + zero_point.float().unsqueeze(-1)
        return Codes(values.clamp(low, high).flatten(-2).char(), scale, zero_point)

    def _searched(self, grouped: Tensor) -> tuple[Tensor, Tensor | None]:
        """For every group the range, as a share of the widest, with the least squared error."""
        import torch

        widest = self._widest(grouped)
        found = [self._stored(grouped, widest * clip, clip) for clip in CLIP_RATIOS]
        errors = [
            (self.dequantize(self._codes(grouped, *each)).view_as(grouped) - grouped).square().sum(-1) for each in found
        ]
        best = torch.stack(errors).argmin(0, keepdim=True)
        scale = torch.stack([scale for scale, _ in found]).gather(0, best)[0]
        zeros = [zero for _, zero in found if zero is not None]
        return scale, torch.stack(zeros).gather(0, best)[0] if zeros else None
