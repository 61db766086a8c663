"""The quantize stage: low-bit weights, trained or just rounded."""

from distill.stages.quantize.spec import Quantize

__all__ = ["Quantize"]
