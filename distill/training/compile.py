"""Models compiled while they train, in place: names in a ``state_dict`` stay, and nothing of it stays afterwards.

The bodies alone are compiled. The heads run a chunk of tokens at a time inside a function with its own gradient, which
is fused by hand already.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.exc import InductorError

from distill.core.errors import MachineError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BACKEND = "inductor"


@contextmanager
def compiled_bodies(*models: PreTrainedModel) -> Iterator[None]:
    """Compile what stands before each model's head, for as long as the context lasts.

    Raises:
        MachineError: this machine cannot compile it.
    """
    bodies: list[Any] = [model.base_model for model in models]
    for body in bodies:
        body.compile(backend=BACKEND)
    try:
        yield
    except (BackendCompilerFailed, InductorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise MachineError(
            f"compute.compile: this machine cannot compile the model ({reason}); set it to false"
        ) from error
    finally:
        for body in bodies:
            body._compiled_call_impl = None  # torch offers no other way back
