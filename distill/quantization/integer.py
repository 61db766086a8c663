"""Integer quantization: symmetric and asymmetric codes, and how their scale is computed.

    symmetric:   scale = max|w| / ((2^b - 1) / 2)          values = clamp(round(w / scale), low, high)
    asymmetric:  scale = (max(w, 0) - min(w, 0)) / (2^b - 1)   values = clamp(round(w / scale) + zero_point, low, high)
                 zero_point = clamp(round(low - min(w, 0) / scale), low, high)

with low = -2^(b-1), high = 2^(b-1) - 1 and halves rounded to even: the grid of compressed-tensors and torchao. The
scale is rounded to its stored type *before* the division, so an engine that reads the model in bfloat16 has the same
scale that the codes were made with. A group of zeros has scale 1.

Do not quantize a dequantized weight again: its largest magnitude is a multiple 2^(b-1) - 1 or 2^(b-1) of the scale, not
(2^b - 1) / 2, so the second scale differs from the first, and the codes may differ too.

A learned scale starts at the value with the least squared error. With v = w / scale, its gradient in a group of N
weights is

    d scale = sum_i d w_i * (low if v_i <= low else high if v_i >= high else round(v_i) - v_i) / sqrt(N * high)

and the gradient of the weight passes where low <= v <= high. The parameter is log(scale), and it gets this gradient
without the chain-rule factor `scale`: Adam is invariant to a constant factor, except that a small one is lost in its
epsilon. The source starts at 2 mean|w| / sqrt(high), which needs a longer training.

Source: Esser et al. 2019, arXiv 1902.08153, sections 2.1 and 2.2 (learned scales).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from distill.quantization.base import Codes, QuantizerSpec

if TYPE_CHECKING:
    from torch import Tensor

CLIP_RATIOS = tuple(1 - step / 20 for step in range(16))


class IntegerSpec(QuantizerSpec):
    """Base class of the integer quantizers."""

    scale: Literal["absmax", "mse", "learned"] = "absmax"
    """absmax: from the largest weight; mse: searched for the least squared error (at every training step, so better for
    rounding without training); learned: trained with the weights (LSQ, for 4 bits and below)."""

    def num_bits(self) -> int:
        """Bits per code."""
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
        """The arguments without the grouping, which a subclass adds."""
        return {"num_bits": self.num_bits(), "type": "int", "symmetric": self.symmetric(), "dynamic": False}

    @property
    def clips(self) -> bool:
        return self.scale != "absmax"

    def initial_scale(self, weight: Tensor) -> Tensor | None:
        if self.scale != "learned":
            return None
        grouped = weight.detach().float().unflatten(-1, (self.groups(weight.shape[-1]), -1))
        return self._search_scale(grouped)[0].float()

    def gradients(
        self, weight: Tensor, scale: Tensor, zero_point: Tensor | None, gradient: Tensor
    ) -> tuple[Tensor, Tensor]:
        low, high = self.limits()
        groups = scale.shape[-1]
        # all [out_features, groups, weights per group]
        upstream = gradient.float().unflatten(-1, (groups, -1))
        exact = weight.float().unflatten(-1, (groups, -1)) / scale.float().unsqueeze(-1)
        if zero_point is not None:
            exact = exact + zero_point.float().unsqueeze(-1)
        lowest, highest = (low, high) if self.clips else self.ends()  # LSQ clips at the last code itself
        inside = (exact >= lowest) & (exact <= highest)
        to_scale = upstream * (exact.round() - exact).where(inside, exact.clamp(low, high))
        to_weight = (upstream * inside).flatten(-2).to(weight.dtype)
        return to_weight, to_scale.sum(-1) / (exact.shape[-1] * high) ** 0.5

    def quantize(self, weight: Tensor, scale: Tensor | None = None) -> Codes:
        scale = self.initial_scale(weight) if scale is None else scale
        groups = self.groups(weight.shape[-1]) if scale is None else scale.shape[-1]
        grouped = weight.detach().float().unflatten(-1, (groups, -1))
        if scale is not None:
            return self._codes(grouped, *self._round_scale(grouped, scale.float()))
        if self.scale == "mse":
            return self._codes(grouped, *self._search_scale(grouped))
        return self._codes(grouped, *self._round_scale(grouped, self._absmax_scale(grouped)))

    def quantize_on(self, weight: Tensor, scale: Tensor, zero_point: Tensor | None) -> Codes:
        return self._codes(weight.detach().float().unflatten(-1, (scale.shape[-1], -1)), scale, zero_point)

    def _absmax_scale(self, grouped: Tensor) -> Tensor:
        """The fp32 scale whose range contains every weight, [out_features, groups].

        Args:
            grouped: [out_features, groups, weights per group].
        """
        low, high = self.limits()
        if self.symmetric():
            extent, steps = grouped.abs().amax(-1), (high - low) / 2
        else:
            extent, steps = grouped.amax(-1).clamp(min=0) - grouped.amin(-1).clamp(max=0), float(high - low)
        # the divisor is a tensor: CUDA would multiply by the reciprocal of a Python number, which rounds differently
        return extent / extent.new_full((), steps)

    def _round_scale(self, grouped: Tensor, scale: Tensor, clip: float = 1.0) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point in their stored types; ``clip`` is the fraction of the range that is kept."""
        scale = scale.bfloat16()
        scale = scale.masked_fill(scale == 0, 1.0)
        if self.symmetric():
            return scale, None
        low, high = self.limits()
        start = low - grouped.amin(-1).clamp(max=0) * clip / scale.float()
        return scale, start.round().clamp(low, high).char()

    def _codes(self, grouped: Tensor, scale: Tensor, zero_point: Tensor | None) -> Codes:
        """Codes of weights [out_features, groups, group], with scale and zero point [out_features, groups]."""
        low, high = self.limits()
        values = (grouped / scale.float().unsqueeze(-1)).round()
        if zero_point is not None:
            values = values + zero_point.float().unsqueeze(-1)
        return Codes(values.clamp(low, high).flatten(-2).char(), scale, zero_point)

    def _search_scale(self, grouped: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point per group with the least squared error, over fractions of the absmax range."""
        import torch

        widest = self._absmax_scale(grouped)
        found = [self._round_scale(grouped, widest * clip, clip) for clip in CLIP_RATIOS]
        errors = [  # [out_features, groups] per clip ratio
            (self.dequantize(self._codes(grouped, *each)).view_as(grouped) - grouped).square().sum(-1) for each in found
        ]
        best = torch.stack(errors).argmin(0, keepdim=True)
        scale = torch.stack([scale for scale, _ in found]).gather(0, best)[0]
        zeros = [zero for _, zero in found if zero is not None]
        return scale, torch.stack(zeros).gather(0, best)[0] if zeros else None
