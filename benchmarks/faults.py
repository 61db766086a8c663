"""Fault injection: runs are killed, stopped, frozen and given bad input; records what was lost each time.

Each row of the result is a fault, how often it was injected, what happened, and what was lost.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import psutil

from benchmarks import damage, fault_machines, fault_signals, hardware, result
from distill.core.run_folder import CHECKPOINTS
from distill.training.checkpoint import checkpoints
from tests.faults.campaign import Campaign
from tests.faults.cells import WORLDS, Cell, Text, pairs
from tests.faults.chaos import chaos_recipe
from tests.faults.kills import KillCampaign
from tests.faults.resumes import Resumes
from tests.faults.signals import IMPORTS, Tally, many_stages_recipe
from tests.faults.workers import Workers, World

PAGE = Path(__file__).parents[1] / "docs" / "reliability.md"
RESULT = result.FOLDER.parent / "faults.json"
TWO = ("--set", "compute.devices=2", "--set", "compute.silence_s=20")
SHARDED = (*TWO, "--set", "compute.strategy=fsdp")
BEHIND = ("--set", "compute.write_checkpoints=behind")
LIMIT_S = 1200


Rows = Iterator[dict[str, Any]]


@dataclass
class Bench:
    """Folder and processes for the runs."""

    workers: Workers
    recipe: Path
    folder: Path
    number: int = 0

    def fresh(self) -> Path:
        self.number += 1
        return self.folder / f"run-{self.number}"

    def start(self, run: Path, size: int, *options: str) -> World:
        more = TWO if size == 2 else ()
        arguments = ["run", str(self.recipe), "--run-dir", str(run), *more, *options]
        return self.workers.start(arguments, size=size, log=run.with_name(run.name + ".log"))

    def weights(self, run: Path) -> bytes:
        return (run / "train" / "model" / "model.safetensors").read_bytes()

    def whole(self, size: int) -> bytes:
        """The weights of an undisturbed run."""
        run = self.fresh()
        assert self.start(run, size).wait(LIMIT_S) == [0] * size
        return self.weights(run)

    def until_saved(self, world: World, run: Path) -> None:
        while not checkpoints(run / "train" / CHECKPOINTS):
            assert world.running(), world.said()
            time.sleep(0.001)


def main() -> None:
    """Run the requested parts, write the JSON, and generate the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run; others are kept")
    parser.add_argument("--kills", type=int, default=300, help="number of kills of runs with one process")
    parser.add_argument("--kills-of-two", type=int, default=100, help="kills of two processes, for ddp and fsdp each")
    parser.add_argument("--stage-kills", type=int, default=60, help="number of kills of runs with nine kinds of stage")
    parser.add_argument("--repeats", type=int, default=5, help="number of times for each other fault")
    parser.add_argument("--restarts", type=int, default=20, help="number of restarts by torchrun")
    parser.add_argument("--signals", type=int, default=300, help="signals at random moments, including earlier calls")
    parser.add_argument(
        "--since",
        default=date.today().isoformat(),
        help="date since which trainings of the part `resumed` are not measured again",
    )
    parser.add_argument("--page", action="store_true", help="only generate the page from the JSON")
    options = parser.parse_args()
    with Workers(IMPORTS) as workers, tempfile.TemporaryDirectory() as place:
        for part in [] if options.page else options.parts:
            _measure(part, workers, Path(place) / part, options)
    PAGE.write_text(render(json.loads(RESULT.read_text(encoding="utf-8"))), encoding="utf-8")


def _measure(part: str, workers: Workers, place: Path, options: argparse.Namespace) -> None:
    """Run one part. Its rows replace the rows of its last run."""
    place.mkdir()
    text, recipe = place / "text.jsonl", place / "chaos.yaml"
    rows = [{"text": f"row {i}: " + f"{i * i} more words. " * (i % 9)} for i in range(100)]
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe.write_text(chaos_recipe(text))
    done: list[dict[str, Any]] = []
    for row in PARTS[part](Bench(workers, recipe, place), options):
        done.append({"part": part, "date": date.today().isoformat()} | row)
        every = [row for row in _rows() if row["part"] != part or part == "signalled"]
        every += done[-1:] if part == "signalled" else done
        result.write(
            RESULT.stem,
            command="python -m benchmarks.faults",
            hardware=hardware.describe(),
            versions=hardware.versions(),
            rows=sorted(every, key=lambda row: list(PARTS).index(row["part"])),
            folder=RESULT.parent,
        )


def _rows() -> list[dict[str, Any]]:
    """The rows of the JSON."""
    rows: list[dict[str, Any]] = json.loads(RESULT.read_text(encoding="utf-8"))["rows"] if RESULT.exists() else []
    return rows


def _killed(bench: Bench, options: argparse.Namespace, *more: str, where: str = "") -> Rows:
    cases: list[tuple[str, int, tuple[str, ...], int]] = [
        ("1 process", 1, (), options.kills),
        ("2 processes, ddp", 2, TWO, options.kills_of_two),
        ("2 processes, fsdp", 2, SHARDED, options.kills_of_two),
    ]
    for world, size, arguments, kills in cases:
        if not kills:
            continue
        name, arguments = world + where, (*arguments, *more)
        toll = Campaign(bench.workers, bench.recipe, "train", bench.fresh(), size, arguments, limit_s=LIMIT_S).run(
            kills
        )
        points = ", ".join(f"{count} {point}" for point, count in sorted(toll.kills.items()))
        print(name, toll, flush=True)
        yield {
            "fault": f"SIGKILL of a process ({points})",
            "run": name,
            "times": toll.kills.total(),
            "what happened": _identical(toll.exact, toll.finished, "weights"),
            "lost": "nothing" if not toll.lost and toll.exact == toll.finished else "; ".join(toll.lost) or "bits",
            "seconds": round(toll.seconds),
        }


def _killed_behind(bench: Bench, options: argparse.Namespace) -> Rows:
    where = ", checkpoints written in a thread (`compute.write_checkpoints: behind`)"
    return _killed(bench, options, *BEHIND, where=where)


def _killed_every_stage(bench: Bench, options: argparse.Namespace) -> Rows:
    """Kills at random moments of a run with nine kinds of stage; every file of weights is compared."""
    recipe = bench.folder / "many-stages.yaml"
    recipe.write_text(many_stages_recipe(bench.folder / "text.jsonl"))
    cases = [("1 process", 1, ()), ("2 processes, ddp", 2, TWO)]
    for (world, size, arguments), share in zip(cases, (0.6, 0.4), strict=True):
        place, began, left = bench.fresh(), time.monotonic(), round(share * options.stage_kills)
        place.mkdir()
        campaign = KillCampaign(bench.workers, recipe, place, size, arguments, limit_s=LIMIT_S)
        tallies: list[Tally] = []
        while left > 0:
            tallies.append(campaign.run(left))
            left -= tallies[-1].signals.total()
            print(world, tallies[-1], flush=True)
        if not tallies:
            continue
        during = sum((tally.stages for tally in tallies), Counter[str]())
        wrong = [line for tally in tallies for line in tally.wrong]
        finished, exact = sum(tally.finished for tally in tallies), sum(tally.exact for tally in tallies)
        yield {
            "fault": "SIGKILL of a process at random moments of a run with nine kinds of stage ("
            f"{', '.join(f'{count} {stage}' for stage, count in sorted(during.items()))})",
            "run": f"{world}, nine kinds of stage",
            "times": during.total(),
            "what happened": _identical(exact, finished, "files of weights"),
            "lost": "; ".join(wrong) or "nothing",
            "seconds": round(time.monotonic() - began),
        }


def _stopped(bench: Bench, options: argparse.Namespace) -> Rows:
    for size in (1, 2):
        expected = bench.whole(size)
        for number, code in ((signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)):

            def stop(
                number: signal.Signals = number, code: int = code, size: int = size, expected: bytes = expected
            ) -> bool:
                run = bench.fresh()
                world = bench.start(run, size)
                bench.until_saved(world, run)
                world.send(number, rank=size - 1)
                codes = world.wait(LIMIT_S)
                again = bench.start(run, size).wait(LIMIT_S)
                return codes == [code] * size and again == [0] * size and bench.weights(run) == expected

            did = f"step finished and saved, exit code {code} of all processes, resumed to the same weights"
            yield _row(f"{number.name} to the last process", size, options.repeats, stop, did)


def _damaged(bench: Bench, options: argparse.Namespace) -> Rows:
    expected = bench.whole(1)

    def damage(spoil: Callable[[Path], None]) -> bool:
        run = bench.fresh()
        world = bench.start(run, 1)
        while len(checkpoints(run / "train" / CHECKPOINTS)) < 2:
            assert world.running(), world.said()
            time.sleep(0.001)
        world.send(signal.SIGKILL, rank=0)
        world.wait(LIMIT_S)
        newest = checkpoints(run / "train" / CHECKPOINTS)[0]
        spoil(newest)
        world = bench.start(run, 1)
        return world.wait(LIMIT_S) == [0] and f"{newest}: damaged" in world.said() and bench.weights(run) == expected

    def flip(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)

    did = "named in a warning, previous checkpoint used, resumed to the same weights"
    cut = lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])  # noqa: E731
    yield _row("newest checkpoint cut in half", 1, options.repeats, lambda: damage(cut), did)
    yield _row("one bit of the newest checkpoint flipped", 1, options.repeats, lambda: damage(flip), did)


def _lost(bench: Bench, options: argparse.Namespace) -> Rows:
    """A process that is dead or frozen, with the default of ``silence_s``."""
    two = bench.whole(2)
    for number, fault in ((signal.SIGKILL, "dead"), (signal.SIGSTOP, "frozen")):
        for victim in (0, 1):
            took: list[float] = []

            def lose(number: signal.Signals = number, victim: int = victim, took: list[float] = took) -> bool:
                run = bench.fresh()
                world = bench.start(run, 2, "--set", "compute.silence_s=60")
                bench.until_saved(world, run)
                world.send(number, rank=victim)
                began = time.monotonic()
                world.processes[1 - victim].join(LIMIT_S)
                took.append(time.monotonic() - began)
                ended = world.processes[1 - victim].exitcode == 1 and took[-1] <= 120
                named = number == signal.SIGKILL or f"rank {victim} (process" in world.said()
                world.processes[victim].kill()
                world.wait(LIMIT_S)
                return ended and named and bench.start(run, 2).wait(LIMIT_S) == [0, 0] and bench.weights(run) == two

            row = _row(f"rank {victim} {fault} ({number.name})", 2, options.repeats, lose, "")
            did = f"the other ends with one line, after at most {max(took):.0f} s; resumed to the same weights"
            yield row | {"what happened": row["what happened"] + did}


def _restarted(bench: Bench, options: argparse.Namespace) -> Rows:
    two, environment = bench.whole(2), os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "3"]
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "distill", "run", str(bench.recipe)]

    def restart() -> bool:
        run = bench.fresh()
        log = run.with_suffix(".log")
        command = [*torchrun, *meeting, "--run-dir", str(run)]
        with log.open("w") as out, subprocess.Popen(command, env=environment, stdout=out, stderr=out) as agent:
            while not checkpoints(run / "train" / CHECKPOINTS):
                assert agent.poll() is None, log.read_text()
                time.sleep(0.001)
            workers = psutil.Process(agent.pid).children()
            next(worker for worker in workers if worker.environ().get("RANK") == "1").kill()
            code = agent.wait(LIMIT_S)
        once = log.read_text().count("resuming from step") == 1
        return code == 0 and once and bench.weights(run) == two

    did = "restarted once, connected again, resumed to the same weights"
    yield _row("SIGKILL of rank 1 under torchrun", 2, options.restarts, restart, did)


def _resumed(bench: Bench, options: argparse.Namespace) -> Rows:
    """One row per combination of settings."""
    earlier = [row for row in _rows() if row["part"] == "resumed" and row["date"] >= options.since]
    earlier = [row for row in earlier if row["lost"] == "nothing"]
    yield from earlier
    known = [row["cell"] for row in earlier]
    resumes = Resumes(bench.workers, Text(bench.folder / "text").make(bench.workers), bench.folder, LIMIT_S)
    for cell in [cell for cell in [*pairs(), Cell(compile=True)] if asdict(cell) not in known]:
        began = time.monotonic()
        different = resumes.difference(cell)
        print(cell, different, flush=True)
        yield {
            "cell": asdict(cell),
            "run": cell.world,
            "times": len(cell.steps()),
            "lost": different or "nothing",
            "seconds": round(time.monotonic() - began),
        }


def _moved(bench: Bench, options: argparse.Namespace) -> Rows:
    resumes = Resumes(bench.workers, Text(bench.folder / "text").make(bench.workers), bench.folder, LIMIT_S)
    one, *several = WORLDS
    ways = [*((one, other) for other in several), *((other, one) for other in several), tuple(several)]
    for trained, worlds in product(
        ("text only", "distilled", "hidden-state losses"), [*ways, (several[1], one, several[0])]
    ):
        began = time.monotonic()
        moved = resumes.moved([Cell(trained, world=world, dropout=False) for world in worlds])
        print(trained, worlds, moved, flush=True)
        yield {
            "fault": f"killed and resumed with other processes or another strategy, {trained}",
            "run": " -> ".join(worlds),
            "times": len(worlds) - 1,
            "what happened": ("every step" if not moved.other_rows else f"all but {moved.other_rows} steps")
            + f" read the same rows, losses within {moved.loss_difference:.0e} of the undisturbed run",
            "lost": "nothing" if not moved.other_rows and moved.loss_difference <= 1e-5 else "exactness",
            "seconds": round(time.monotonic() - began),
        }


def _signalled(bench: Bench, options: argparse.Namespace) -> Rows:
    """Random signals. Two processes that are started as a command are connected by the command itself."""
    earlier = [row for row in _rows() if row["part"] == "signalled"]
    recipe = bench.folder / "many-stages.yaml"
    recipe.write_text(many_stages_recipe(bench.folder / "text.jsonl"))
    return fault_signals.measure(bench.workers, recipe, bench.fresh, TWO, earlier, options.signals, LIMIT_S)


def _machines(bench: Bench, options: argparse.Namespace) -> Rows:
    return fault_machines.measure(bench.recipe, bench.fresh, options.repeats, LIMIT_S)


def _hostile(bench: Bench, options: argparse.Namespace) -> Rows:
    """Tests with foreign code in a model folder: each test is a command, with `yes` as its input."""
    file, began = bench.folder / "hostile.xml", time.monotonic()
    tests = Path(__file__).parents[1] / "tests" / "test_foreign_code.py"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            str(tests),
            "-m",
            "not trace",
            "-o",
            "junit_family=xunit1",
            f"--junitxml={file}",
        ],
        check=False,
    )
    cases = list(ElementTree.parse(file).iter("testcase"))
    failed = [case.get("name") for case in cases if case.find("failure") is not None or case.find("error") is not None]
    commands = [int(item.get("value", 0)) for item in ElementTree.parse(file).iter("property")]
    yield {
        "fault": "a model folder with code of its own (Python files named in its configs, a pickle, a template)",
        "run": "every verb, every key of a recipe that names a model; yes typed to any question",
        "times": sum(commands),
        "what happened": "nothing was asked and no code ran" if not failed else f"failed: {failed}",
        "lost": "nothing" if not failed else "safety",
        "seconds": round(time.monotonic() - began),
    }


def _identical(exact: int, finished: int, what: str) -> str:
    if exact == finished:
        return f"{finished} completed runs, all with identical {what}"
    return f"{finished} completed runs, {exact} of them with identical {what}"


def _row(fault: str, size: int, repeats: int, attempt: Callable[[], bool], did: str) -> dict[str, Any]:
    began = time.monotonic()
    held = sum(attempt() for _ in range(repeats))
    print(fault, size, held, repeats, flush=True)
    return {
        "fault": fault,
        "run": f"{size} process" + "es" * (size > 1),
        "times": repeats,
        "what happened": did if held == repeats else f"{held} of {repeats}: {did}",
        "lost": "nothing" if held == repeats else f"in {repeats - held} of {repeats}",
        "seconds": round(time.monotonic() - began),
    }


PARTS: dict[str, Callable[[Bench, argparse.Namespace], Rows]] = {
    "killed": _killed,
    "killed-behind": _killed_behind,
    "killed-every-stage": _killed_every_stage,
    "stopped": _stopped,
    "signalled": _signalled,
    "damaged": _damaged,
    "hostile": _hostile,
    "lost": _lost,
    "restarted": _restarted,
    "machines": _machines,
    "moved": _moved,
    "resumed": _resumed,
}


def render(data: dict[str, Any]) -> str:
    """The page of a result."""
    faults = [row for row in data["rows"] if row["part"] not in ("resumed", "signalled")]
    cells = [row | row["cell"] for row in data["rows"] if row["part"] == "resumed"]
    days = sorted({row["date"] for row in data["rows"]})
    exact = sum(row["lost"] == "nothing" for row in cells)
    lines = [
        "<!-- Made by `python -m benchmarks.faults --page` of benchmarks/faults.json; edit the text there. -->",
        "# Fault injection",
        "",
        "Faults were injected into real runs. The tables show how often, and what was lost. Measured by "
        f"`{data['command']}` on {' to '.join(dict.fromkeys((days[0], days[-1])))}: {data['hardware']['cpu']}, no GPU; "
        "several processes communicated through gloo.",
        "",
        "*Times* is the number of injected faults. A killed run is started again until it finishes, so a completed run "
        "may have been killed several times, or not at all if it finished before the next kill. In brackets are the "
        "moments of the kills: any time, or a step of writing a file.",
        "",
        *_table(["fault", "run", "times", "what happened", "lost", "date"], faults),
        "",
        "*Identical* and *same* weights are bitwise equal to those of an undisturbed run. Runs on two machines, and "
        "runs that were resumed with other processes or another strategy, are compared by their losses: on two "
        "machines within 0.1 %, because the order of sums differs.",
        "",
        *fault_signals.page([row for row in data["rows"] if row["part"] == "signalled"], _table),
        damage.section(),
        "",
        "## Exact resuming",
        "",
        f"{exact} of {len(cells)} trainings, with dropout, have bitwise the same weights and metrics as an undisturbed "
        "training. For any two columns, every combination of their values occurs in at least one row (pairwise "
        "testing), except for unsupported combinations (on-policy samples with fsdp, a cache of a stream). A training "
        "is killed once in the middle of an epoch, once at its end, or after each of the first five steps, "
        "always directly after a checkpoint.",
        "",
        *_table(["trained", "data", "run", "killed", "micro_batches", "num_workers", "compile", "lost"], cells),
        "",
        "[multi-gpu.md](multi-gpu.md) lists the exit codes. If a loss or gradient is not finite, the step is skipped, "
        "and its text is stored in `bad-batches/`; `max_skipped_steps` consecutive steps end the run. If the disk is "
        "full, the run ends with one line, and the last checkpoint is kept ([tests](guarantees.md) check both).",
        "",
        "Not tested: GPUs and NCCL, machines with their own kernels and disks, disks that do not sync.",
    ]
    return "\n".join(lines) + "\n"


def _table(head: list[str], rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| " + " | ".join(str(row[key]) for key in head) + " |" for row in rows]
    return ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head), *lines]


if __name__ == "__main__":
    main()
