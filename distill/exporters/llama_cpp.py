"""llama.cpp as an engine to compare with: logits of every position, and its own tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.core.errors import DistillError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

    from distill.quantization.kv_cache import CacheType


class LlamaCpp:
    """A GGUF file that is open in llama.cpp, with its defaults; a context manager.

    Args:
        file: the model.
        context_tokens: the longest sequence.
        cache: type of the cache of keys and values, which a low-bit one has under flash attention only; None: fp16.

    Raises:
        DistillError: llama.cpp does not load it.
    """

    def __init__(self, file: Path, context_tokens: int, cache: CacheType | None = None):
        import llama_cpp
        import torch

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
            raise DistillError(f"{file}: llama.cpp does not load it ({error or type(error).__name__})") from error

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *_: object) -> None:
        self._llama.close()

    def logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """[batch, sequence, vocabulary], fp32, of ``input_ids`` [batch, sequence]."""
        import torch

        return torch.stack([self._row(row) for row in batch["input_ids"].tolist()])

    def _row(self, ids: list[int]) -> Tensor:
        import torch

        self._llama.reset()
        self._llama.eval(ids)
        return torch.from_numpy(self._llama.scores[: len(ids)].copy())

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerFast, rows: Iterable[Sequence[int]]) -> None:
        """Cut the text of some rows of ids with the file's tokenizer and with the trained model's.

        Raises:
            DistillError: they cut a text differently.
        """
        for row in rows:
            text = str(tokenizer.decode(list(row)))
            ours = tokenizer(text)["input_ids"]
            theirs = self._llama.tokenize(text.encode(), add_bos=True, special=True)
            if ours != theirs:
                pairs = enumerate(zip(ours, theirs, strict=False))
                at = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
                raise DistillError(
                    f"{self.file}: llama.cpp cuts text otherwise than the trained model's tokenizer, first after "
                    f"{tokenizer.decode(ours[max(0, at - 4) : at])!r}: {ours[at : at + 4]} became {theirs[at : at + 4]}"
                )
