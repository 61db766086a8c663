"""Deliverables: a model written for one engine and held against the trained model in that engine."""

from distill.core.spec import Family
from distill.exporters.base import CardFacts, ExporterSpec, VerifyResult
from distill.exporters.gguf import Gguf
from distill.exporters.huggingface import HuggingFace
from distill.exporters.onnx import Onnx
from distill.exporters.torchao import Torchao

EXPORTERS = Family("exporter", HuggingFace, Gguf, Onnx, Torchao)

__all__ = ["EXPORTERS", "CardFacts", "ExporterSpec", "Gguf", "HuggingFace", "Onnx", "Torchao", "VerifyResult"]
