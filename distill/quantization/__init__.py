"""Quantizers of weights and activations, and the fake-quantized layers that train with them.

To add a quantizer, write one file in this folder and import its class here.
"""

from distill.core.spec import Family
from distill.quantization.base import Codes, QuantizerSpec
from distill.quantization.inputs import ActivationSpec

# `distill list` shows them in this order
# isort: off
from distill.quantization.int8_channel import Int8Channel
from distill.quantization.int_group import IntGroup
from distill.quantization.fp8 import Fp8
from distill.quantization.ternary import Ternary
from distill.quantization.binary import Binary
from distill.quantization.q8_0 import Q80
from distill.quantization.q6_k import Q6K
from distill.quantization.q4_0 import Q40
from distill.quantization.tq2_0 import Tq20
from distill.quantization.dynamic_int8 import DynamicInt8
from distill.quantization.static_int8 import StaticInt8

QUANTIZERS = Family.among("quantizer", globals(), QuantizerSpec)
ACTIVATIONS = Family.among("activation grid", globals(), ActivationSpec)
