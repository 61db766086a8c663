"""Low-bit grids for weights and the layers that train on them; add a file and a name to this list to add one."""

from distill.core.spec import Family
from distill.quantization.base import Codes, QuantizerSpec
from distill.quantization.binary import Binary
from distill.quantization.fp8 import Fp8
from distill.quantization.int8_channel import Int8Channel
from distill.quantization.int_group import IntGroup
from distill.quantization.q4_0 import Q40
from distill.quantization.q8_0 import Q80
from distill.quantization.ternary import Ternary
from distill.quantization.tq2_0 import Tq20

QUANTIZERS = Family("quantizer", Int8Channel, IntGroup, Fp8, Ternary, Binary, Q80, Q40, Tq20)

__all__ = [
    "Q40",
    "Q80",
    "QUANTIZERS",
    "Binary",
    "Codes",
    "Fp8",
    "Int8Channel",
    "IntGroup",
    "QuantizerSpec",
    "Ternary",
    "Tq20",
]
