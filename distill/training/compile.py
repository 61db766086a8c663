"""Compiles models in place while they are trained. The names in a ``state_dict`` stay the same.

Each decoder layer is compiled by itself, so that all layers of a model share one graph. Compiled as a whole, a body
would get a dense mask from transformers, which cannot check during tracing whether documents share a row: attention
would not use the flash kernel, and keys and values would be repeated for each query head. The heads are not compiled:
they are called chunk by chunk in an ``autograd.Function`` whose gradient is written by hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch._dynamo
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.exc import InductorError

from distill.core.errors import MachineError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BACKEND = "inductor"


@contextmanager
def compiled_bodies(*models: PreTrainedModel) -> Iterator[None]:
    """Compile the layers of each model, without its head, within the ``with`` block.

    Raises:
        MachineError: this machine cannot compile the model.
    """
    parts = [part for model in models for part in _layers(model)]
    for part in parts:
        part.compile(backend=BACKEND)
    try:
        # layers with other grids, and batches with and without position ids, are each a graph of the same code; beyond
        # the limit dynamo would run the remaining layers without compiling them
        with torch._dynamo.config.patch(recompile_limit=8 + 4 * len(parts)):
            yield
    except (BackendCompilerFailed, InductorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise MachineError(
            f"compute.compile: this machine cannot compile the model ({reason}); set it to false"
        ) from error
    finally:
        for part in parts:
            # Private API of torch: ``Module.compile`` stores the compiled call here and has no inverse. Otherwise
            # the model would stay compiled after its training: conversion changes its layers, and each later call of
            # another shape would be traced and compiled again.
            part._compiled_call_impl = None


def _layers(model: PreTrainedModel) -> list[Any]:
    """The decoder layers of a model; its whole body if it does not name their class."""
    body: Any = model.base_model
    blocks = set(model._no_split_modules or ())
    return [part for part in body.modules() if type(part).__name__ in blocks] or [body]
