"""How long architectures take to decode a token, measured on this machine on models of random weights."""

from __future__ import annotations

import platform
import socket
from collections.abc import Mapping, Sequence

import torch

from distill.core.run_folder import CHECKPOINTS
from distill.evaluation.speed import measure_speed, quietest
from distill.models.load import load_config
from distill.pruning.budget import SizeCosts
from distill.pruning.latency import LatencyModel
from distill.pruning.plan import config_changes
from distill.pruning.search import SearchSpace
from distill.stages.prune.search.measurement_cache import MeasurementCache
from distill.stages.session import StageContext
from distill.training.trainer import dtype_on, resolve_device

NEW_TOKENS = 32
"""The time of a token is the median over so many steps, the last of the context."""
ROUNDS = 3
"""Processes that measure an architecture; the one that was disturbed least counts."""
NOISE = 1.05
"""A smaller architecture that takes so many times as long as a larger one was disturbed."""
REPEATS = 2
"""How often the disturbed are measured again."""


def machine(device: str) -> str:
    """On what a time was measured: another machine takes none of it over, and measures anew."""
    chip = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} of {torch.get_num_threads()}"
    return f"{socket.gethostname()} ({chip})"


class Clock:
    """Measures architectures once each.

    Args:
        context: of the stage.
        reference: the uncut model.
        space: the architectures.
        dtype: in which the pruned model will be stored, and run on a GPU.
        cache: what was measured before.
    """

    def __init__(self, context: StageContext, reference: str, space: SearchSpace, dtype: str, cache: MeasurementCache):
        self.context, self.space = context, space
        self._reference, self._dtype, self._cache = reference, dtype, cache
        self._device = resolve_device(context.session.compute)
        self._kind = f"latency on {machine(self._device)}"

    def forecast(self, flops: SizeCosts) -> LatencyModel:
        """From measuring the uncut model, the smallest size of each axis, and all of these at once."""
        probes = [{}, *self.space.corners()]
        self.context.say(f"search: measuring the latency of {len(probes)} architectures")
        sizes = [self.space.sizes(choice) for choice in probes]
        times = [self.ms(one) for one in sizes]
        for _ in range(REPEATS):
            disturbed = slower_than_larger(sizes, times)
            if disturbed:
                self.context.say(
                    f"search: {len(disturbed)} of them took longer than larger ones, and are measured again"
                )
            for i in disturbed:
                self._cache.forget(self._kind, self._name(sizes[i]))
                times[i] = self.ms(sizes[i])
        return LatencyModel(flops, list(zip(sizes, times, strict=True)))

    def forget(self) -> None:
        """Measure anew when there is a next time: what led to nothing may have been disturbed."""
        self._cache.forget(self._kind)

    def ms(self, sizes: Mapping[str, int]) -> float:
        """Milliseconds per token of an architecture, the median.

        Raises:
            MachineError: it cannot be run here.
        """
        return float(self._cache.get(self._kind, self._name(sizes), lambda: {"ms": self._measure(sizes)})["ms"])

    def _name(self, sizes: Mapping[str, int]) -> str:
        changed = {axis: size for axis, size in sizes.items() if size != self.space.before[axis]}
        return ",".join(f"{axis}={size}" for axis, size in changed.items()) or "whole"

    def _measure(self, sizes: Mapping[str, int]) -> float:
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
                dtype=dtype_on(self._device),
            )
            for _ in range(ROUNDS)
        ]
        speed = quietest(rounds)
        assert speed.decode_tokens_per_s_p50 is not None
        return 1e3 / speed.decode_tokens_per_s_p50


def slower_than_larger(sizes: Sequence[Mapping[str, int]], times: Sequence[float]) -> list[int]:
    """Places of the architectures that took longer than one which is no smaller along any axis."""
    return [
        i
        for i, one in enumerate(sizes)
        if any(
            times[i] > NOISE * times[j] and all(one[axis] <= size for axis, size in other.items())
            for j, other in enumerate(sizes)
        )
    ]
