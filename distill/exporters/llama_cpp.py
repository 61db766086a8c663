"""A GGUF file in llama.cpp: logits of every position, and the file's tokenizer, for the comparison."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import cache as once
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from distill.core.errors import DistillError
from distill.exporters.base import VerifyResult
from distill.exporters.compare_logits import compare, plain_logits
from distill.models.kv_cache import cache_type
from distill.quantization.kv_cache import CacheType

REINSTALL = "CMAKE_ARGS=-DGGML_NATIVE=OFF pip install --force-reinstall --no-cache-dir llama-cpp-python"
_TRY = (
    "import sys; from distill.core.orphan import die_with; die_with(int(sys.argv[2])); import llama_cpp; "
    "llama_cpp.Llama(sys.argv[1], n_ctx=32, n_threads=1, verbose=False).eval([0])"
)


@once
def check_engine(file: Path) -> None:
    """Let a child process load a file in llama.cpp and read one token, before this process does.

    A llama.cpp that was compiled for another processor ends the process that calls it ("Illegal instruction"), which no
    ``except`` catches: on virtual machines a native build (the default of its package) often uses instructions that the
    processor does not have.

    Raises:
        DistillError: the child was ended by a signal. Errors that llama.cpp reports itself are left to the caller.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    child = subprocess.run(
        [sys.executable, "-c", _TRY, str(file), str(os.getpid())],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=False,
    )
    if child.returncode >= 0:
        return
    name = signal.Signals(-child.returncode).name
    why = {
        "SIGILL": f"it was compiled for another processor; install it again: {REINSTALL}",
        "SIGKILL": "this machine has probably too little memory for it",
    }.get(name, f"its build does not work on this machine; install it again: {REINSTALL}")
    raise DistillError(f"{file}: llama.cpp crashed when it loaded the file ({name}): {why}")


class LlamaCpp:
    """A GGUF file opened in llama.cpp with default settings; a context manager.

    Args:
        file: the model.
        context_tokens: length of the longest sequence.
        cache: type of a low-bit KV cache, which also enables flash attention; None: fp16.

    Raises:
        DistillError: llama.cpp cannot load the file, or crashes.
    """

    def __init__(self, file: Path, context_tokens: int, cache: CacheType | None = None):
        check_engine(file)
        import llama_cpp

        self.file = file
        threads = torch.get_num_threads()
        kind = None if cache is None else getattr(llama_cpp, f"GGML_TYPE_{cache.upper()}")
        try:
            self._llama: Any = llama_cpp.Llama(
                str(file),
                n_ctx=context_tokens,
                n_batch=context_tokens,
                n_threads=threads,
                n_threads_batch=threads,
                flash_attn=cache is not None,
                type_k=kind,
                type_v=kind,
                logits_all=True,
                verbose=False,
            )
        except (ValueError, RuntimeError, AssertionError) as error:
            raise DistillError(f"{file}: llama.cpp cannot load the file ({error or type(error).__name__})") from error

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *_: object) -> None:
        self._llama.close()

    def logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Logits, fp32 [batch, sequence, vocabulary], for ``input_ids`` [batch, sequence]."""
        return torch.stack([self._row(row) for row in batch["input_ids"].tolist()])

    def _row(self, ids: list[int]) -> Tensor:
        self._llama.reset()
        self._llama.eval(ids)
        return torch.from_numpy(self._llama.scores[: len(ids)].copy())

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerFast, rows: Iterable[Sequence[int]]) -> None:
        """Compare the file's tokenizer with the trained model's on the text of some rows of ids.

        Raises:
            DistillError: they produce different ids.
        """
        for row in rows:
            ids = list(row)
            # both tokenizers put the first token before a text themselves; llama.cpp prints a warning for a second one
            text = str(tokenizer.decode(ids[1:] if ids[:1] == [tokenizer.bos_token_id] else ids))
            ours = tokenizer(text)["input_ids"]
            theirs = self._llama.tokenize(text.encode(), add_bos=True, special=True)
            if ours != theirs:
                pairs = enumerate(zip(ours, theirs, strict=False))
                at = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
                raise DistillError(
                    f"{self.file}: llama.cpp's tokenizer differs from the trained model's, first after "
                    f"{tokenizer.decode(ours[max(0, at - 4) : at])!r}: got {theirs[at : at + 4]}, expected "
                    f"{ours[at : at + 4]}; use a tokenizer that llama.cpp supports, or another target"
                )


def compared(
    source_model: PreTrainedModel,
    file: Path,
    batches: Iterable[Mapping[str, Tensor]],
    tokenizer: PreTrainedTokenizerFast | None,
) -> VerifyResult:
    """Compare a file in llama.cpp with the trained model; see :meth:`~distill.exporters.base.ExporterSpec.verify`.

    Raises:
        DistillError: the file does not load, or its tokenizer produces different ids.
    """
    batches = list(batches)
    longest = max((batch["input_ids"].shape[-1] for batch in batches), default=1)
    with LlamaCpp(file, context_tokens=longest, cache=cache_type(source_model.config)) as engine:
        if tokenizer is not None:
            engine.check_tokenizer(tokenizer, [row for batch in batches for row in batch["input_ids"].tolist()])
        with plain_logits(source_model) as source:
            return compare(source, engine.logits, batches, file.parent, file.stat().st_size)
