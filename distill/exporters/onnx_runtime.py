"""A graph in ONNX Runtime: logits of every position, with or without a KV cache, for the comparison."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.core.errors import DistillError
from distill.exporters.onnx_names import PAST, PRESENT, inputs_of
from distill.models.load import task_of


class OnnxRuntime:
    """A graph opened in ONNX Runtime on the CPU.

    Args:
        file: the graph.

    Raises:
        DistillError: ONNX Runtime cannot load it.
    """

    def __init__(self, file: Path):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self._session: Any = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's errors have no common base class
            first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise DistillError(f"{file}: ONNX Runtime cannot load the graph ({first.strip()})") from error
        self._inputs = {asked.name: asked.shape for asked in self._session.get_inputs()}
        self.caches = any(name.startswith(PAST) for name in self._inputs)

    def logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Logits, fp32 [batch, sequence, vocabulary], or [batch, 1, classes] for a classifier.

        Args:
            batch: ``input_ids`` int64 [batch, sequence]; optionally ``attention_mask`` (default: ones) and
                ``token_type_ids`` (default: zeros).
        """
        ids = batch["input_ids"]
        every = {"attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids), **batch}
        if self.caches:
            return self._in_two(ids.cpu(), every["attention_mask"].cpu())
        names = [name for name in self._inputs if name in every]
        return by_position(self._run({name: every[name].cpu() for name in names})["logits"])

    def _in_two(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits in two calls: the first half fills the KV cache that the second half reads."""
        half = (ids.shape[-1] + 1) // 2
        empty = {
            name: torch.zeros(len(ids), shape[1], 0, shape[3])
            for name, shape in self._inputs.items()
            if name.startswith(PAST)
        }
        first = self._run({"input_ids": ids[:, :half], "attention_mask": mask[:, :half], **empty})
        if half == ids.shape[-1]:
            return first["logits"]
        past = {name: first[name.replace(PAST, PRESENT)] for name in empty}
        second = self._run({"input_ids": ids[:, half:], "attention_mask": mask, **past})
        return torch.cat([first["logits"], second["logits"]], 1)

    def _run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        names = [made.name for made in self._session.get_outputs()]
        made = self._session.run(names, {name: tensor.numpy() for name, tensor in inputs.items()})
        return {name: torch.from_numpy(array) for name, array in zip(names, made, strict=True)}


def padded(batch: Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """A batch for an encoder whose last row is padded from the middle on, and has token type 1 from its third token on.

    An encoder attends in both directions, so a wrong padding mask or token type would change the logits everywhere.
    """
    ids = batch["input_ids"].to(model.device)
    attended, second = torch.ones_like(ids), torch.zeros_like(ids)
    attended[-1, (ids.shape[-1] + 1) // 2 :] = 0
    second[-1, 2:] = 1
    every = {"input_ids": ids, "attention_mask": attended, "token_type_ids": second}
    mask = attended.bool() & batch["mask"].to(model.device)
    named = {name: every[name] for name in inputs_of(model.config)}
    return named | {"mask": mask.any(-1, keepdim=True) if task_of(model.config) == "classification" else mask}


def encoder_logits(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """Logits of the trained encoder, in the shape of :meth:`OnnxRuntime.logits`."""
    return by_position(model(**{name: batch[name] for name in inputs_of(model.config)}).logits.float())


def by_position(logits: Tensor) -> Tensor:
    """Add a sequence dimension to the logits of a classifier: [batch, classes] -> [batch, 1, classes]."""
    return logits if logits.ndim > 2 else logits.unsqueeze(1)
