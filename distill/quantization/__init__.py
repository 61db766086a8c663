"""Low-bit grids for weights and activations, and the layers that train on them; add a file and a name here for one."""

from distill.core.spec import Family
from distill.quantization.base import Codes, QuantizerSpec
from distill.quantization.binary import Binary
from distill.quantization.dynamic_int8 import DynamicInt8
from distill.quantization.fp8 import Fp8
from distill.quantization.inputs import ActivationSpec
from distill.quantization.int8_channel import Int8Channel
from distill.quantization.int_group import IntGroup
from distill.quantization.q4_0 import Q40
from distill.quantization.q8_0 import Q80
from distill.quantization.static_int8 import StaticInt8
from distill.quantization.ternary import Ternary
from distill.quantization.tq2_0 import Tq20

QUANTIZERS = Family("quantizer", Int8Channel, IntGroup, Fp8, Ternary, Binary, Q80, Q40, Tq20)
ACTIVATIONS = Family("activation grid", DynamicInt8, StaticInt8)

__all__ = [
    "ACTIVATIONS",
    "Q40",
    "Q80",
    "QUANTIZERS",
    "ActivationSpec",
    "Binary",
    "Codes",
    "DynamicInt8",
    "Fp8",
    "Int8Channel",
    "IntGroup",
    "QuantizerSpec",
    "StaticInt8",
    "Ternary",
    "Tq20",
]
