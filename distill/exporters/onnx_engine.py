"""ONNX Runtime for measurements: prompts, steps and logits of a graph on the CPU.

Loaded by name in the process that measures; see :mod:`distill.evaluation.engine`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy
import onnxruntime
import torch

from distill.core.errors import InputError
from distill.exporters.onnx_names import FILE, PAST, PRESENT


def open_engine(opening: Any) -> OnnxEngine:
    """Load the graph of an export.

    Args:
        opening: a :class:`~distill.evaluation.engine.Opening`, whose location is the folder of the export.

    Raises:
        InputError: ONNX Runtime cannot load it.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = opening.threads or torch.get_num_threads()
    file = Path(opening.location) / FILE
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no common base class
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(f"{file}: ONNX Runtime cannot load the graph ({first.strip()})") from error
    return OnnxEngine(session, options.intra_op_num_threads)


class OnnxEngine:
    """A graph, with or without a KV cache; see :class:`~distill.evaluation.engine.Engine`.

    Without a cache it reads whole texts only. It computes the logits of every position of what it reads.

    Args:
        session: that holds the graph.
        threads: CPU threads.
    """

    device, dtype = "cpu", "float32"

    def __init__(self, session: Any, threads: int):
        self._session, self.threads = session, threads
        self.name = f"ONNX Runtime {version('onnxruntime')}"
        self._asked = {one.name: one.shape for one in session.get_inputs()}
        self._empty = [name for name in self._asked if name.startswith(PAST)]
        self._past: dict[str, numpy.ndarray] = {}
        self.decodes = bool(self._empty)
        self.vocabulary = self._run(numpy.zeros((1, 1), numpy.int64), {}).shape[-1]  # or classes

    def reserve(self, batch: int, tokens: int) -> None:
        self._past = {}

    def prefill(self, ids: numpy.ndarray) -> numpy.ndarray:
        self._past = {}
        return self._last(self._run(ids, self._past))

    def step(self, ids: numpy.ndarray) -> numpy.ndarray:
        return self._last(self._run(ids[:, None], self._past))

    @staticmethod
    def _last(logits: numpy.ndarray) -> numpy.ndarray:
        """Of the last position, [batch, vocabulary]; those of a classifier are of the whole text."""
        return logits if logits.ndim == 2 else logits[:, -1]

    def logits(self, ids: Sequence[int], first: int) -> Iterator[numpy.ndarray]:
        yield self._run(numpy.array([[*ids]], numpy.int64), {})[0, first:]

    def row(self, ids: Sequence[int], second: int | None) -> numpy.ndarray:
        kinds = None if second is None else (numpy.arange(len(ids)) >= second).astype(numpy.int64)[None]
        found = self._run(numpy.array([[*ids]], numpy.int64), {}, kinds)
        return found if found.ndim == 2 else found[0]  # [1, classes], or [tokens, vocabulary]

    def device_memory(self) -> int | None:
        return None

    def _run(
        self, ids: numpy.ndarray, past: dict[str, numpy.ndarray], kinds: numpy.ndarray | None = None
    ) -> numpy.ndarray:
        """Logits [batch, tokens, vocabulary] or [batch, classes]; keys and values go on in ``past``."""
        rows = len(ids)
        for name in self._empty:
            if name not in past:
                shape = self._asked[name]
                past[name] = numpy.zeros((rows, shape[1], 0, shape[3]), numpy.float32)
        length = ids.shape[1] + (past[self._empty[0]].shape[2] if self._empty else 0)
        inputs = {"input_ids": ids, "attention_mask": numpy.ones((rows, length), numpy.int64), **past}
        if "token_type_ids" in self._asked:
            inputs["token_type_ids"] = numpy.zeros_like(ids) if kinds is None else kinds
        names = ["logits", *(name.replace(PAST, PRESENT) for name in self._empty)]
        logits, *present = self._session.run(names, inputs)
        past.update(zip(self._empty, present, strict=True))
        return logits
