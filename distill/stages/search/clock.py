"""How long architectures take to decode a token, measured on this machine on models of random weights."""

from __future__ import annotations

import platform
import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING

from distill.core.run import CHECKPOINTS
from distill.stages.base import StageContext
from distill.stages.search.found import Found

if TYPE_CHECKING:
    from distill.pruning.budget import Costs
    from distill.pruning.latency import Latency
    from distill.pruning.search import Space

NEW_TOKENS = 32
"""The time of a token is the median over so many steps, the last of the context."""
ROUNDS = 3
"""Processes that measure an architecture; the one that was disturbed least counts."""


def machine(device: str) -> str:
    """On what a time was measured: another machine takes none of it over, and measures anew."""
    import torch

    chip = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} of {torch.get_num_threads()}"
    return f"{socket.gethostname()} ({chip})"


class Clock:
    """Measures architectures once each.

    Args:
        context: of the stage.
        reference: the uncut model.
        space: the architectures.
        dtype: in which the pruned model will be stored, and run on a GPU.
        found: what was measured before.
    """

    def __init__(self, context: StageContext, reference: str, space: Space, dtype: str, found: Found):
        from distill.training.trainer import resolve_device

        self.context, self.space = context, space
        self._reference, self._dtype, self._found = reference, dtype, found
        self._device = resolve_device(context.session.compute)

    def forecast(self, flops: Costs) -> Latency:
        """From measuring the uncut model, the smallest size of each axis, and all of these at once."""
        from distill.pruning.latency import Latency

        probes = [{}, *self.space.corners()]
        self.context.say(f"search: measuring the latency of {len(probes)} architectures")
        sizes = [self.space.sizes(choice) for choice in probes]
        return Latency(flops, [(one, self.ms(one)) for one in sizes])

    def ms(self, sizes: Mapping[str, int]) -> float:
        """Milliseconds a token of an architecture, the median.

        Raises:
            MachineError: it cannot be run here.
        """
        changed = {axis: size for axis, size in sizes.items() if size != self.space.before[axis]}
        name = ",".join(f"{axis}={size}" for axis, size in changed.items()) or "whole"
        here = machine(self._device)
        return float(self._found.get(f"latency on {here}", name, lambda: {"ms": self._measure(sizes)})["ms"])

    def _measure(self, sizes: Mapping[str, int]) -> float:
        from distill.evaluation.speed import measure_speed, quietest
        from distill.models.load import load_config
        from distill.pruning.plan import config_changes

        session, space = self.context.session, self.space
        folder = self.context.folder / CHECKPOINTS / "latency"
        old = load_config(session.artifact(self._reference).location)
        layers = tuple(range(sizes["layers"]))
        changes = config_changes(space.layout, space.config, space.before, sizes, layers)
        type(old).from_dict({**old.to_dict(), **changes, "dtype": self._dtype}).save_pretrained(folder)
        length = session.data.sequence_length
        new_tokens = min(NEW_TOKENS, length // 2)
        rounds = [
            measure_speed(
                folder,
                weights="random",
                prompt_tokens=length - new_tokens,
                new_tokens=new_tokens,
                repeats=2,
                device=self._device,
                dtype="auto" if self._device == "cuda" else "float32",
            )
            for _ in range(ROUNDS)
        ]
        speed = quietest(rounds)
        assert speed.decode_tokens_per_s_p50 is not None
        return 1e3 / speed.decode_tokens_per_s_p50
