"""Export a model in memory for an engine, and verify the file in that engine."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from distill.api.batches import batches as batches_of
from distill.api.batches import on_device
from distill.api.spec import checked
from distill.core.artifact import Artifact, replacing
from distill.core.errors import InputError
from distill.core.spec import NAME
from distill.data.python_docs import PythonDocs
from distill.data.tokenizer import check_written as check_tokenizer
from distill.exporters import EXPORTERS
from distill.exporters.base import EngineMissing, ExporterSpec, VerifyResult, require_writers
from distill.exporters.compressed_tensors import save
from distill.exporters.model_card import write_card
from distill.models.configs import positions_of
from distill.models.load import load_model
from distill.models.written import check_written
from distill.quantization.convert import round_unquantized
from distill.quantization.fake_quant import fake_quant_layers


@dataclass(frozen=True)
class Exported:
    """An exported model. It can be used as the path of its folder.

    Attributes:
        folder: with the weights, the tokenizer and the model card.
        verified: the difference from the model in memory, as the engine computes it; or the reason why the export
            could not be verified.
        notes: how the weights were converted.
    """

    folder: Path
    verified: VerifyResult | str
    notes: tuple[str, ...]

    def __fspath__(self) -> str:
        return str(self.folder)


def export(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    folder: str | Path,
    *,
    target: ExporterSpec | Mapping[str, Any] | str = "huggingface",
    batches: Iterable[Mapping[str, Tensor]] | None = None,
    title: str | None = None,
    base_model: str | None = None,
) -> Exported:
    """Write a model for an engine, load the file in that engine, and compare its logits with those of the model.

    Only an export that was not found wrong takes the place of ``folder``; if the engine is not installed, the card and
    the result say so.

    Args:
        model: a causal language model, plain or from :func:`distill.quantize`; not changed. Merge LoRA adapters first.
        tokenizer: its tokenizer.
        folder: target folder; if it exists it is replaced.
        target: the format: ``"huggingface"``, ``"gguf"``, ``"onnx"`` or ``"torchao"``, or settings such as
            ``{"kind": "gguf", "embeddings": "f16"}``.
        batches: text on which the two are compared, as :func:`distill.batches` makes it. None: pages of Python's
            documentation.
        title: name of the model in its card and file names; None: the name of the folder.
        base_model: Hub id of the model at the root of the line, for the card's metadata. None: what the model's own
            folder says.

    Returns:
        The folder, the result of the comparison, and notes on the conversion.

    Raises:
        InputError: the format cannot hold this model, a package is missing, or an argument is wrong.
        DistillError: the exported model differs from the model.
        MachineError: the disk is full or not writable.

    Examples:
        >>> import distill, tempfile
        >>> teacher, tokenizer = distill.load("builtin:quickstart-teacher")
        >>> low_bit = distill.quantize(teacher, {"kind": "int_group", "group_size": 32})
        >>> out = distill.export(low_bit, tokenizer, tempfile.mkdtemp() + "/small")
        >>> out.verified.worst_kl < 1e-6
        True
    """
    spec = checked(cast("type[ExporterSpec]", Annotated[ExporterSpec, EXPORTERS]), target, "target")
    place = Path(folder)
    name = title or re.sub(r"^[^A-Za-z0-9]+|[^A-Za-z0-9._-]+", "-", place.name)[:100].strip("-") or "model"
    if not re.fullmatch(NAME, name):
        raise InputError(f"title: got {name!r}, expected letters, digits, . _ and -, 100 at most")
    if hasattr(model, "peft_config") or not hasattr(model, "save_pretrained"):
        raise InputError(
            f"model: got {type(model).__name__}, expected a model of transformers; merge adapters first "
            "(merge_and_unload)"
        )
    if place.exists() and not place.is_dir():
        raise InputError(f"{place}: is a file, expected the name of a folder")
    require_writers(spec)
    read = on_device(_text(model, tokenizer) if batches is None else batches, torch.device("cpu"))
    with TemporaryDirectory(prefix="distill-") as temporary:
        source = Path(temporary) / "model"
        _write(model, tokenizer, source)
        verified: VerifyResult | str
        with replacing(place) as new:
            notes = spec.export(source, new, title=name)
            try:
                plain = load_model(str(source), dtype="float32", tasks=spec.tasks)
                verified = spec.verify(plain, new, read, tokenizer)
            except EngineMissing as missing:
                verified = str(missing)
            write_card(
                new,
                title=name,
                facts=spec.card(new),
                engine=spec.engine,
                lineage=Artifact(name, str(model.config._name_or_path)).lineage(),
                notes=notes,
                verified=verified,
                base_model=base_model,
            )
    return Exported(place, verified, tuple(notes))


def _write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """A model folder as a stage would leave it: packed if the model is quantized."""
    layers = fake_quant_layers(model)
    if layers:
        scales = {layer.spec.scale_dtype for layer in layers.values()}
        is_float32 = len(scales) > 1 or str(model.config.dtype).endswith("float32")
        dtype = torch.float32 if is_float32 else getattr(torch, scales.pop())
        rounded = copy.deepcopy(model).cpu()
        round_unquantized(rounded, dtype)
        save(rounded, folder, dtype=dtype)
    else:
        plain = model if model.device.type == "cpu" else copy.deepcopy(model).cpu()
        plain.save_pretrained(folder)
        check_written(folder, plain)
    tokenizer.save_pretrained(folder)
    check_tokenizer(folder, tokenizer)


def _text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Iterable[Mapping[str, Tensor]]:
    """Some rows of Python's documentation."""
    limit = positions_of(model.config.get_text_config().to_dict()) or 256
    texts = (document.text[:2000] for document in islice(PythonDocs(parts="topics").documents(), 4))
    return batches_of(texts, tokenizer, sequence_length=min(256, limit), batch_size=4)
