"""Low-bit grids for weights and the layers that train on them; add a file and a name to this list to add one."""

from distill.core.spec import Family
from distill.quantization.base import Codes, QuantizerSpec
from distill.quantization.int4_group import Int4Group
from distill.quantization.int8_channel import Int8Channel

QUANTIZERS = Family("quantizer", Int8Channel, Int4Group)

__all__ = ["QUANTIZERS", "Codes", "Int4Group", "Int8Channel", "QuantizerSpec"]
