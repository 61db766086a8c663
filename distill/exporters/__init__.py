"""Exporters: each writes a model in the format of one engine and compares it with the trained model in that engine.

To add an exporter, write one file in this folder and import its class here.
"""

from distill.core.spec import Family
from distill.exporters.base import CardFacts, ExporterSpec, VerifyResult

# `distill list` shows them in this order
# isort: off
from distill.exporters.huggingface import HuggingFace
from distill.exporters.gguf import Gguf
from distill.exporters.onnx import Onnx
from distill.exporters.torchao import Torchao

EXPORTERS = Family.among("exporter", globals(), ExporterSpec)
