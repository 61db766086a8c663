"""Kills a process where it hurts: in the middle of what it writes; or signals it where it is at a chosen function.

Everything that a run leaves is written under another name, synced and renamed, so these few calls are all the moments
at which a file is in the making: of a checkpoint, a model, a marker or a recipe.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

POINTS = ("half written", "before sync", "after sync", "before rename", "after rename")


@dataclass(frozen=True)
class Kill:
    """SIGKILL at one of :data:`POINTS`.

    Attributes:
        point: where.
        number: at which of the calls of this kind, from 1.
        name: count only calls with a file of this name; "" counts all. Not for syncs, which name no file.
    """

    point: str
    number: int
    name: str = ""

    def arm(self) -> None:
        """From now on this process is going to be killed.

        Raises:
            ValueError: no such point.
        """
        import torch

        if self.point not in POINTS:
            raise ValueError(f"{self.point!r} is not one of {', '.join(POINTS)}")
        if self.point == "half written":
            save, cut = torch.save, self._around(torch.save, before=None, after=_cut)
            # what travels to other processes is saved into memory
            torch.save = lambda value, file, *more, **options: (save if hasattr(file, "write") else cut)(
                value, file, *more, **options
            )
            return
        moment, _, call = self.point.partition(" ")
        name = {"sync": "fsync", "rename": "replace"}[call]
        guarded = self._around(getattr(os, name), **{"before": None, "after": None, moment: _die})
        setattr(os, name, guarded)

    def _around(
        self, call: Callable[..., Any], *, before: Callable[..., Any] | None, after: Callable[..., Any] | None
    ) -> Callable[..., Any]:
        left = self.number

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= any(Path(str(arg)).name == self.name for arg in args) if self.name else 1
            if left == 0 and before is not None:
                before(*args)
            result = call(*args, **kwargs)
            if left == 0 and after is not None:
                after(*args)
            return result

        return counted


@dataclass(frozen=True)
class Signal:
    """A signal to the process itself, as it enters a function.

    Attributes:
        number: of the signal.
        where: the function, as ``package.module:name`` or ``package.module:Class.name``.
        at: at which of its calls, from 1.
    """

    number: int
    where: str
    at: int = 1

    def arm(self) -> None:
        """From now on this process is going to be signalled."""
        module, _, path = self.where.partition(":")
        *owners, name = path.split(".")
        owner, left = import_module(module), self.at
        for part in owners:
            owner = getattr(owner, part)
        call = getattr(owner, name)

        def signalled(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), self.number)
            return call(*args, **kwargs)

        setattr(owner, name, signalled)


def as_on_a_terminal() -> None:
    """For ``preexec_fn``: the process hears the signals that we ignore when we run in the background."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def _die(*args: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _cut(_: Any, file: Any) -> None:
    """Leave half of what has just been written, as if the process had died in the middle."""
    os.truncate(file, Path(file).stat().st_size // 2)
    _die()


def chaos_recipe(text: Path) -> str:
    """A recipe to be killed: a training of seconds that saves at every other step, with dropout.

    Args:
        text: a JSONL file.
    """
    import yaml

    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "max_position_embeddings": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "attention_dropout": 0.2}
    train = {"kind": "finetune", "num_steps": 24, "batch_size": 2, "validate_every_steps": 24}
    recipe = {
        "name": "chaos",
        "data": {
            "train": {"kind": "jsonl", "path": str(text)},
            "sequence_length": 16,
            "validation_tokens": 60,
            "tokenizer": {"vocab_size": 260},
        },
        "stages": {"train": train | {"model": {"config": {"model_type": "llama"} | shape | heads}}},
        "compute": {"accelerator": "cpu", "micro_batch_size": 1, "checkpoint_every_steps": 2},
        "logging": {"wandb": "disabled"},
    }
    return yaml.safe_dump(recipe, sort_keys=False)
