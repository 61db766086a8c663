"""Measure models in memory beside their teacher, on the same text."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping

from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from distill.api.batches import TextRows, on_device
from distill.api.measured_rows import Rows
from distill.core.errors import InputError
from distill.evaluation.quality import FIGURES, measure_quality
from distill.models.size import count_parameters
from distill.quantization.fake_quant import fake_quant_layers, quantizer_tensors
from distill.reporting.tradeoff import Row


def evaluate(
    models: Mapping[str, PreTrainedModel],
    batches: Iterable[Mapping[str, Tensor]],
    *,
    teacher: str | None = "teacher",
) -> Rows:
    """Measure the quality of models on held-out text, and how close they are to their teacher.

    All figures are exact sums over the counted tokens of all batches. Size on disk and speed are properties of files in
    their engine, so they are measured by ``distill evaluate`` and by a recipe, and not here.

    Args:
        models: name -> model, such as ``{"teacher": teacher, "student": student}``. All have the tokens of ``batches``.
        batches: held-out text, as :func:`distill.batches` makes it.
        teacher: name of the model with which the others are compared; it may be missing in ``models`` if it has this
            default, or be None: then there is no comparison.

    Returns:
        One :class:`~distill.reporting.tradeoff.Row` per model, in the order of ``models``: perplexity; loss in nats per
        token; bits per byte, if ``batches`` are texts of :func:`distill.batches`; KL to the teacher in nats per token;
        fraction of tokens with the same top token.

    Raises:
        InputError: there is no model, no counted token, or a token that a model does not have.

    Examples:
        >>> import distill
        >>> teacher, tokenizer = distill.load("builtin:quickstart-teacher")
        >>> batches = distill.batches(["The cat sat on the mat. " * 20], tokenizer, sequence_length=64)
        >>> low_bit = distill.quantize(teacher, "int8_channel")
        >>> rows = distill.evaluate({"teacher": teacher, "int8": low_bit}, batches)
        >>> [row.name for row in rows], rows[1].kl_to_teacher < 0.01
        (['teacher', 'int8'], True)
    """
    if not models:
        raise InputError("models: there is none; give a mapping from names to models")
    if teacher is not None and teacher not in models:
        if teacher != "teacher":
            raise InputError(f"teacher: no model {teacher!r} among {', '.join(models)}")
        teacher = None
    num_bytes = _num_bytes(batches)
    read = on_device(batches, next(next(iter(models.values())).parameters()).device)
    rows = []
    for name, model in models.items():
        other = models[teacher] if teacher is not None else None
        quality = measure_quality(model, other, read, num_bytes)
        figures = {key: getattr(quality, key) for key in FIGURES}
        broken = [key for key, value in figures.items() if value is not None and not math.isfinite(value)]
        total, inner = _num_parameters(model)
        rows.append(
            Row(
                name=name,
                role="teacher" if name == teacher else "student",
                scheme=_scheme(model),
                notes=f"not a finite number: {', '.join(broken)}" if broken else "",
                parameters=total,
                non_embedding_parameters=inner,
                **figures | dict.fromkeys(broken),
            )
        )
    return Rows(rows)


def _num_bytes(batches: Iterable[Mapping[str, Tensor]]) -> int | None:
    """Bytes of text that the counted predictions stand for; None where they are not known."""
    rows = batches.dataset if isinstance(batches, DataLoader) else None
    if not isinstance(rows, TextRows) or rows.tokens.num_learned is not None:
        return None
    return int(rows.bytes_of_rows().sum())


def _num_parameters(model: PreTrainedModel) -> tuple[int, int]:
    """(parameters, parameters without embedding and head), without the scales of a quantizer."""
    total, inner = count_parameters(model)
    own = quantizer_tensors(model)
    scales = {id(p): p.numel() for name, p in model.named_parameters() if name in own}
    ends = {id(p) for layer in fake_quant_layers(model).values() if layer.is_end for p in layer.parameters()}
    return total - sum(scales.values()), inner - sum(size for key, size in scales.items() if key not in ends)


def _scheme(model: PreTrainedModel) -> str | None:
    """The grids of a quantized model in a few words, those of most layers first; None for any other model."""
    layers = fake_quant_layers(model).values()
    counts = Counter(layer.spec.label() for layer in layers if not layer.is_end).most_common()
    ends = dict.fromkeys(layer.spec.label() for layer in layers if layer.is_end)
    return "; ".join([*(label for label, _ in counts), *(f"embeddings {label}" for label in ends)]) or None
