"""The part of ``benchmarks.faults`` that sends signals to runs at random moments, and its section of the page."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from distill.core import listener
from distill.stages import STAGES
from distill.training.saver import STEP_S
from tests.faults.signals import SignalCampaign, kinds_of_stages
from tests.faults.workers import Workers

TYPED = ", by the command line"
"""Suffix of runs that are started as a command, with all imports; the others are forked from a warm process."""
SHARES = {"1 process": 0.75, "2 processes, ddp": 0.15, "1 process" + TYPED: 0.05, "2 processes, ddp" + TYPED: 0.05}
"""Fractions of the signals."""

WORDS = f"""\
## Signals at any moment

| signal | exit code | sent by |
| --- | --- | --- |
| SIGTERM, SIGUSR1 | 75 | a scheduler that needs the machine |
| SIGHUP | 75 | a terminal that is closed; with `nohup` it is ignored, and the run continues |
| SIGINT | 130 | Ctrl-C; it is ignored if a shell script starts the run in the background, as for any program |

- During a training, the current step is finished and saved. Each of the two may take {STEP_S / 60:.0f} minutes.
- In other stages, the run stops before the next unit of work: a batch, a document, a candidate of a search, a tensor
  of an export. Finished work is kept.
- A library that handles no signals (an import, a download, W&B) is interrupted after {listener.PATIENCE_S:.0f} seconds.
  A process that has not ended {listener.LEAVE_S:.0f} seconds later is ended, with the same exit code, and so are its
  child processes. W&B's offline file may then lack its last rows; the run folder has them.
- A second signal ends the process immediately. A signal within {listener.DEBOUNCE_S:.0f} second of the first is the
  same signal, sent to a process and to its group.
- If there are several processes, it is sufficient that one of them gets the signal.
- A signal after the last stage only shortens the remaining work, such as W&B's upload, and the exit code is 0.
- In the first tenth of a second, while Python itself starts, a signal ends the command like any other program.
"""


def measure(
    workers: Workers,
    recipe: Path,
    fresh: Callable[[], Path],
    two: Sequence[str],
    earlier: Sequence[dict[str, Any]],
    num_signals: int,
    limit_s: float,
) -> Iterator[dict[str, Any]]:
    """Signal runs and restart them until they are finished, until there are enough signals; yields one row per run.

    Args:
        workers: processes that start runs.
        recipe: path of :func:`~tests.faults.signals.many_stages_recipe`.
        fresh: function that returns a new folder.
        two: options for two processes.
        earlier: rows of earlier calls, whose signals are counted.
        num_signals: total number of signals.
        limit_s: time limit of one attempt, in seconds.
    """
    for name, share in SHARES.items():
        size, is_typed = int(name[0]), name.endswith(TYPED)
        more = [*(two if size == 2 else ()), *(("--set", "compute.num_workers=1") if is_typed else ())]
        before = [row["times"] for row in earlier if row["run"] == name]
        left = round(share * num_signals) - sum(before)
        campaign = SignalCampaign(
            None if is_typed else workers,
            recipe,
            fresh(),
            1 if is_typed else size,
            more,
            seed=len(before),
            limit_s=limit_s,
        )
        campaign.folder.mkdir()
        while left > 0:
            began = time.monotonic()
            tally = campaign.run(left)
            left -= tally.signals.total()
            print(name, tally, flush=True)
            yield {
                "run": name,
                "times": tally.signals.total(),
                "signals": dict(tally.signals),
                "stages": dict(tally.stages),
                "codes": dict(tally.codes),
                "finished": tally.finished,
                "exact": tally.exact,
                "slowest_s": max(tally.seconds, default=0.0),
                "wrong": tally.wrong,
                "seconds": round(time.monotonic() - began),
            }


def page(rows: Sequence[dict[str, Any]], table: Callable[[list[str], list[dict[str, Any]]], list[str]]) -> list[str]:
    """Lines of the page: what signals do, and the results."""
    if not rows:
        return WORDS.split("\n")
    shown = []
    for name in dict.fromkeys(row["run"] for row in rows):
        some = [row for row in rows if row["run"] == name]
        finished, exact = (sum(row[key] for row in some) for key in ("finished", "exact"))
        shown.append(
            {
                "run": name,
                "signals": sum(row["times"] for row in some),
                "exit codes": _counts(some, "codes"),
                "same weights": f"{exact} of {finished} runs",
                "longest until the end": f"{max(row['slowest_s'] for row in some):.0f} s",
                "not as promised": sum(len(row["wrong"]) for row in some),
            }
        )
    return [
        *WORDS.split("\n"),
        f"{sum(row['times'] for row in rows)} signals were sent at random moments of a run with all kinds of "
        f"stage except {' and '.join(sorted(set(STAGES) - kinds_of_stages()))}, with W&B offline; "
        "after each, the same command was started again. They were sent to one process, to both, or "
        f"to the process group: {_counts(rows, 'signals')}. They arrived during: {_counts(rows, 'stages')}.",
        "",
        *table(list(shown[0]), shown),
        "",
        "Exit code 0 means that all stages were finished when the signal arrived.",
        "",
    ]


def _counts(rows: Sequence[dict[str, Any]], key: str) -> str:
    total: Counter[str] = sum((Counter(row[key]) for row in rows), Counter())
    return ", ".join(f"{count} x {name}" for name, count in sorted(total.items()))
