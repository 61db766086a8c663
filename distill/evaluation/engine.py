"""The interface of an engine: open a model, then prefill and decode token by token, or compute the logits of a text.

transformers is here (:mod:`distill.evaluation.transformers_engine`); the engines of exports are files of
:mod:`distill.exporters`, each with a function ``open_engine``, and are loaded by name in the process that runs them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import numpy

TRANSFORMERS = "distill.evaluation.transformers_engine"
Weights = Literal["stored", "random"]


@dataclass(frozen=True)
class Opening:
    """How an engine is opened.

    Attributes:
        location: the model's folder, or a Hub id for transformers.
        module: the module whose ``open_engine`` opens it.
        device: "cpu", "cuda" or "cuda:N".
        dtype: "auto" (as stored) or a torch type's name; of transformers alone.
        threads: CPU threads; None: torch's own choice.
        kv_cache: type of a low-bit KV cache; None: the engine's default.
        pooling: how a model without a head makes embeddings ("mean" or "cls", whether they are normalised); None: its
            hidden states are the result.
        weights: "random" runs what a folder's config describes; it needs no weights. Of transformers alone.
    """

    location: str
    module: str = TRANSFORMERS
    device: str = "cpu"
    dtype: str = "auto"
    threads: int | None = None
    kv_cache: str | None = None
    weights: Weights = "stored"
    pooling: tuple[str, bool] | None = None

    def open(self) -> Engine:
        """Load the engine and the model, in this process."""
        engine: Engine = import_module(self.module).open_engine(self)
        return engine


class Engine(Protocol):
    """A model that is loaded.

    Attributes:
        name: of the engine, with its version.
        device: on which it runs, in words.
        dtype: of its arithmetic or weights, in words.
        threads: CPU threads in use.
        vocabulary: number of logits.
        decodes: whether it goes on token by token, with keys and values kept.
    """

    name: str
    device: str
    dtype: str
    threads: int
    vocabulary: int
    decodes: bool

    def reserve(self, batch: int, tokens: int) -> None:
        """Make room for so many sequences of so many tokens each; what was kept before is gone."""

    def prefill(self, ids: numpy.ndarray) -> numpy.ndarray:
        """Begin anew with prompts, int64 [batch, tokens] -> logits after the last token, fp32 [batch, vocabulary]."""

    def step(self, ids: numpy.ndarray) -> numpy.ndarray:
        """Go on by a token per sequence, int64 [batch] -> logits after it, fp32 [batch, vocabulary]."""

    def logits(self, ids: Sequence[int], first: int) -> Iterator[numpy.ndarray]:
        """Of one text, after each token from the position ``first`` on, in pieces, fp32 [tokens, vocabulary]."""

    def row(self, ids: Sequence[int], second: int | None) -> numpy.ndarray:
        """Of a whole text of another task than the next token: fp32 [tokens, vocabulary], or [1, classes].

        Args:
            ids: with special tokens.
            second: tokens before the second text of a pair; None: it is no pair.
        """

    def device_memory(self) -> int | None:
        """Most bytes of device memory taken so far; None where the engine does not know, or runs on the CPU."""
