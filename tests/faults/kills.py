"""Kills a run of nine kinds of stage at random moments until it has been killed often enough, and compares every file
of weights in the end with that of a run that nothing happened to."""

from __future__ import annotations

import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from tests.faults.signals import SignalCampaign, Tally
from tests.faults.workers import World


@dataclass
class KillCampaign(SignalCampaign):
    """Attempts at one recipe, each ended by SIGKILL at some moment and gone on with by the same command.

    Of several processes one is killed, or all; then, as any launcher does, those that do not end by themselves are.
    """

    def _attempt(self, run: Path, after_s: float, tally: Tally) -> None:
        """Start, kill after so many seconds, and note in which stage."""
        world = self._start(run)
        assert isinstance(world, World)
        began = time.monotonic()
        while world.running() and time.monotonic() < began + after_s:
            time.sleep(0.01)
        if not world.running():
            return self._unsignalled(world)
        every = [*range(self.size)]
        for rank in self._chance.choice([[rank] for rank in every] + [every] * (self.size > 1)):
            world.send(signal.SIGKILL, rank)
        stages = re.findall(r"^\[\d+/\d+\] (\w+)", world.said(), re.M)
        codes = world.end()
        if -signal.SIGKILL in codes:  # else it had ended just before
            tally.signals["SIGKILL"] += 1
            tally.stages[stages[-1] if stages else "before the stages"] += 1
