"""llama.cpp for measurements: prompts, steps and logits through its C interface, several sequences at once.

Loaded by name in the process that measures (:mod:`distill.evaluation.engine`), never in that of the run: a library that
was built for another processor ends the process that loads it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy
import torch

from distill.core.errors import InputError, MachineError
from distill.exporters.gguf import file_of

CHUNK_TOKENS = 128
"""Tokens of a text whose logits exist at once."""
PADDING = 256
"""llama.cpp rounds the context of a sequence up to a multiple of this."""


@llama_cpp.llama_log_callback
def _silent(level: int, text: bytes, data: Any) -> None:
    """llama.cpp writes hundreds of lines to the terminal otherwise."""


def open_engine(opening: Any) -> LlamaCppEngine:
    """Load the GGUF file of an export.

    Args:
        opening: a :class:`~distill.evaluation.engine.Opening`, whose location is the folder of the export.

    Raises:
        InputError: llama.cpp cannot load the file.
    """
    llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    threads = opening.threads or torch.get_num_threads()
    on_gpu = opening.device != "cpu" and bool(llama_cpp.llama_supports_gpu_offload())
    return LlamaCppEngine(file_of(Path(opening.location)), threads, on_gpu, opening.kv_cache)


class LlamaCppEngine:
    """A GGUF file; see :class:`~distill.evaluation.engine.Engine`.

    Args:
        file: the model.
        threads: CPU threads.
        on_gpu: whether all layers are computed on the GPU.
        kv_cache: type of the KV cache, which also enables flash attention; None: F16.

    Raises:
        InputError: llama.cpp cannot load the file.
    """

    decodes = True

    def __init__(self, file: Path, threads: int, on_gpu: bool, kv_cache: str | None):
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 999 if on_gpu else 0
        model = llama_cpp.llama_model_load_from_file(str(file).encode(), params)
        if not model:
            raise InputError(f"{file}: llama.cpp cannot load the file; export it again")
        self._model: Any = model
        self._kv_cache, self._context, self._batch = kv_cache, None, None
        self.threads, self.device = threads, "cuda" if on_gpu else "cpu"
        self.name = f"llama.cpp (llama-cpp-python {llama_cpp.__version__})"
        self.dtype = self._description()
        self.vocabulary = int(llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model)))
        self._room, self._num_batch, self._read = (0, 0), 0, 0

    def reserve(self, batch: int, tokens: int) -> None:
        tokens = -(-tokens // PADDING) * PADDING
        if self._room == (batch, tokens):
            return
        self._release()
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = batch * tokens, batch
        params.n_batch = min(params.n_ctx, max(params.n_batch, batch))
        params.n_threads = params.n_threads_batch = self.threads
        if self._kv_cache is not None:
            params.type_k = params.type_v = getattr(llama_cpp, f"GGML_TYPE_{self._kv_cache.upper()}")
            params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise MachineError(f"llama.cpp has no room for {batch} sequences of {tokens} tokens")
        self._room, self._num_batch = (batch, tokens), int(params.n_batch)
        self._batch = llama_cpp.llama_batch_init(self._num_batch, 0, 1)

    def prefill(self, ids: numpy.ndarray) -> numpy.ndarray:
        batch, length = ids.shape
        if batch > self._room[0] or length > self._room[1]:
            self.reserve(batch, length)
        self._clear()
        self._read = length
        sequences, places = (part.reshape(-1) for part in numpy.indices((batch, length)))
        return self._last(ids.reshape(-1), places, sequences, places == length - 1)

    def step(self, ids: numpy.ndarray) -> numpy.ndarray:
        places = numpy.full(len(ids), self._read)
        self._read += 1
        return self._last(ids, places, numpy.arange(len(ids)), numpy.ones(len(ids), bool))

    def logits(self, ids: Sequence[int], first: int) -> Iterator[numpy.ndarray]:
        if not self._room[0] or len(ids) > self._room[1]:
            self.reserve(1, len(ids))
        self._clear()
        tokens, places = numpy.array(ids), numpy.arange(len(ids))
        for start in range(0, len(ids), CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            wanted = places[part] >= first
            self._decode(tokens[part], places[part], numpy.zeros_like(places[part]), wanted)
            if wanted.any():
                count = int(wanted.sum())
                found = numpy.ctypeslib.as_array(
                    llama_cpp.llama_get_logits(self._context), shape=(count, self.vocabulary)
                )
                yield found.copy()

    def row(self, ids: Sequence[int], second: int | None) -> numpy.ndarray:
        raise InputError("llama.cpp measures models that predict the next token only; export to onnx")

    def device_memory(self) -> int | None:
        return None

    def _last(
        self, ids: numpy.ndarray, places: numpy.ndarray, sequences: numpy.ndarray, wanted: numpy.ndarray
    ) -> numpy.ndarray:
        """Read tokens, as many at once as the context takes; logits of those that are wanted, in their order."""
        found = []
        for start in range(0, len(ids), self._num_batch):
            part = slice(start, start + self._num_batch)
            self._decode(ids[part], places[part], sequences[part], wanted[part])
            for index in numpy.flatnonzero(wanted[part]).tolist():
                row = llama_cpp.llama_get_logits_ith(self._context, index)
                found.append(numpy.ctypeslib.as_array(row, shape=(self.vocabulary,)).copy())
        return numpy.stack(found)

    def _decode(
        self, ids: numpy.ndarray, places: numpy.ndarray, sequences: numpy.ndarray, wanted: numpy.ndarray
    ) -> None:
        batch: Any = self._batch
        count = batch.n_tokens = len(ids)
        for field, values in ((batch.token, ids), (batch.pos, places), (batch.logits, wanted)):
            numpy.ctypeslib.as_array(field, shape=(count,))[:] = values
        for index, sequence in enumerate(sequences.tolist()):
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequence
        if (code := llama_cpp.llama_decode(self._context, batch)) != 0:
            raise MachineError(f"llama.cpp cannot read {count} tokens (code {code}); lower batch sizes or contexts")

    def _clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)

    def _release(self) -> None:
        if self._context is not None:
            llama_cpp.llama_batch_free(self._batch)
            llama_cpp.llama_free(self._context)
            self._context = None

    def _description(self) -> str:
        """The format of most weights, such as Q4_0."""
        buffer = ctypes.create_string_buffer(256)
        llama_cpp.llama_model_desc(self._model, buffer, len(buffer))
        return buffer.value.decode(errors="replace").split("B ", 1)[-1] if buffer.value else ""
