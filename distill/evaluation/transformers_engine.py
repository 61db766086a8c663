"""transformers as an engine: a model folder in eager PyTorch, as ``from_pretrained`` loads it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any

import numpy
import torch
import transformers
from transformers import AutoModelForCausalLM

from distill.core.quiet import quiet_torchao
from distill.evaluation.engine import Opening
from distill.pretrained import config_from, model_from, model_of


def name() -> str:
    """Of the engine, with versions."""
    return f"transformers {version('transformers')}, torch {version('torch')}"


def open_engine(opening: Opening) -> TransformersEngine:
    """Load a model folder.

    Raises:
        InputError: it does not load.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    quiet_torchao()
    if opening.threads is not None:
        torch.set_num_threads(opening.threads)
    return TransformersEngine(_model(opening, torch.device(opening.device)))


def _model(opening: Opening, device: torch.device) -> Any:
    if opening.weights == "stored":
        return model_from(opening.location, AutoModelForCausalLM, dtype=opening.dtype).to(device).eval()
    config = config_from(opening.location)
    dtype = config.dtype or torch.float32 if opening.dtype == "auto" else getattr(torch, opening.dtype)
    with device:  # drawn where they are used
        return model_of(config, AutoModelForCausalLM, dtype=dtype).eval()


class TransformersEngine:
    """A causal language model; see :class:`~distill.evaluation.engine.Engine`.

    Args:
        model: on its device.
    """

    decodes = True

    def __init__(self, model: Any):
        self._model, self._past = model, None
        self.name, self.threads = name(), torch.get_num_threads()
        self.dtype = str(model.dtype).removeprefix("torch.")
        kind = model.device.type
        self.device = torch.cuda.get_device_name(model.device) if kind == "cuda" else kind
        self.vocabulary: int = model.config.get_text_config().vocab_size
        self._options: dict[str, Any] = {"use_cache": True}
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            self._options["logits_to_keep"] = 1  # an engine computes the last position's logits only

    def reserve(self, batch: int, tokens: int) -> None:
        self._past = None

    def prefill(self, ids: numpy.ndarray) -> numpy.ndarray:
        self._past = None
        return self._forward(torch.from_numpy(ids))

    def step(self, ids: numpy.ndarray) -> numpy.ndarray:
        return self._forward(torch.from_numpy(ids)[:, None])

    @torch.inference_mode()
    def _forward(self, ids: torch.Tensor) -> numpy.ndarray:
        output = self._model(ids.to(self._model.device), past_key_values=self._past, **self._options)
        self._past = output.past_key_values
        return output.logits[:, -1].float().cpu().numpy()  # waits for a device that works ahead

    @torch.inference_mode()
    def logits(self, ids: Sequence[int], first: int) -> Iterator[numpy.ndarray]:
        """The text's logits exist at once: weights that transformers unpacks at a forward are there only in it."""
        text = torch.tensor([[*ids]], device=self._model.device)
        yield self._model(text, use_cache=False).logits[0, first:].float().cpu().numpy()

    def device_memory(self) -> int | None:
        device = self._model.device
        return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
