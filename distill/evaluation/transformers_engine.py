"""transformers as an engine: a model folder in eager PyTorch, as ``from_pretrained`` loads it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any

import numpy
import torch
import transformers

from distill.core.batch import known_inputs
from distill.core.quiet import quiet_torchao
from distill.evaluation.engine import Opening
from distill.models.head import Pooling, pooling_if_any, set_pooling
from distill.models.head_names import head_of, loader_of, task_of
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
    model = _model(opening, torch.device(opening.device))
    if opening.pooling is not None:
        set_pooling(model, Pooling(*opening.pooling))
    return TransformersEngine(model)


def _model(opening: Opening, device: torch.device) -> Any:
    config = config_from(opening.location)
    loader = loader_of(task_of(config))
    if opening.weights == "stored":
        return model_from(opening.location, loader, dtype=opening.dtype).to(device).eval()
    dtype = config.dtype or torch.float32 if opening.dtype == "auto" else getattr(torch, opening.dtype)
    with device:  # drawn where they are used
        return model_of(config, loader, dtype=dtype).eval()


class TransformersEngine:
    """A model of transformers; see :class:`~distill.evaluation.engine.Engine`. An encoder reads whole texts only.

    Args:
        model: on its device.
    """

    def __init__(self, model: Any):
        self._model, self._past = model, None
        self._head = head_of(model)
        self.decodes = self._head == "causal_lm"
        self.name, self.threads = name(), torch.get_num_threads()
        self.dtype = str(model.dtype).removeprefix("torch.")
        kind = model.device.type
        self.device = torch.cuda.get_device_name(model.device) if kind == "cuda" else kind
        self.vocabulary: int = model.config.get_text_config().vocab_size
        self._options: dict[str, Any] = {"use_cache": True} if self.decodes else {}
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
        if not self.decodes:
            return self._row(ids)[:, -1].float().cpu().numpy()
        output = self._model(ids.to(self._model.device), past_key_values=self._past, **self._options)
        self._past = output.past_key_values
        return output.logits[:, -1].float().cpu().numpy()  # waits for a device that works ahead

    @torch.inference_mode()
    def logits(self, ids: Sequence[int], first: int) -> Iterator[numpy.ndarray]:
        """The text's logits exist at once: weights that transformers unpacks at a forward are there only in it."""
        text = torch.tensor([[*ids]], device=self._model.device)
        yield self._model(text, use_cache=False).logits[0, first:].float().cpu().numpy()

    @torch.inference_mode()
    def row(self, ids: Sequence[int], second: int | None) -> numpy.ndarray:
        kinds = None if second is None else (torch.arange(len(ids)) >= second).long().unsqueeze(0)
        states = self._row(torch.tensor([[*ids]]), kinds)
        if (pooling := pooling_if_any(self._model)) is not None:
            states = pooling(states, None).unsqueeze(1)
        return states[0].float().cpu().numpy()

    def _row(self, ids: torch.Tensor, kinds: torch.Tensor | None = None) -> torch.Tensor:
        """[batch, tokens, vocabulary], or [batch, 1, classes]; hidden states of a model without a head."""
        more = {} if kinds is None else known_inputs(self._model, {"token_type_ids": kinds.to(self._model.device)})
        output = self._model(ids.to(self._model.device), **more)
        found: torch.Tensor = output.last_hidden_state if self._head == "embedding" else output.logits
        return found if found.ndim == 3 else found.unsqueeze(1)

    def device_memory(self) -> int | None:
        device = self._model.device
        return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
