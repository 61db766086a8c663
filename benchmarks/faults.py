"""Faults on purpose: runs that are killed, stopped, frozen, fed with rubbish, and what was lost each time.

Each row is a fault, how often it was done, what the run did, and what was lost of it.
"""

from __future__ import annotations

import argparse
import json
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import hardware, result
from distill.core.run import CHECKPOINTS
from distill.testing.campaign import Campaign
from distill.testing.chaos import chaos_recipe
from distill.testing.workers import Workers, World
from distill.training.checkpoint import checkpoints

PAGE = Path(__file__).parents[1] / "docs" / "reliability.md"
RESULT = result.FOLDER.parent / "faults.json"
TWO = ("--set", "compute.devices=2", "--set", "compute.silence_s=20")
SHARDED = (*TWO, "--set", "compute.strategy=fsdp")
LIMIT_S = 600


@dataclass
class Bench:
    """Where runs go, and what starts them."""

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
        """The weights of a run that nothing happens to."""
        run = self.fresh()
        assert self.start(run, size).wait(LIMIT_S) == [0] * size
        return self.weights(run)

    def until_saved(self, world: World, run: Path) -> None:
        while not checkpoints(run / "train" / CHECKPOINTS):
            assert world.running(), world.said()
            time.sleep(0.001)


def main() -> None:
    """Do all of it, write the JSON, and make the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=300, help="of one process")
    parser.add_argument("--kills-of-two", type=int, default=100, help="of two, for ddp and for fsdp each")
    parser.add_argument("--repeats", type=int, default=5, help="of each other fault")
    parser.add_argument("--page", action="store_true", help="only make the page from the JSON")
    options = parser.parse_args()
    if not options.page:
        _measure(options)
    PAGE.write_text(render(json.loads(RESULT.read_text(encoding="utf-8"))), encoding="utf-8")


def _measure(options: argparse.Namespace) -> None:
    with Workers() as workers, tempfile.TemporaryDirectory() as place:
        text = Path(place) / "text.jsonl"
        text.write_text(
            "".join(json.dumps({"text": f"row {i}: " + f"{i * i} more words. " * (i % 9)}) + "\n" for i in range(100))
        )
        recipe = Path(place) / "chaos.yaml"
        recipe.write_text(chaos_recipe(text))
        bench = Bench(workers, recipe, Path(place))
        rows = [*_killed(bench, options), *_stopped(bench, options.repeats), *_damaged(bench, options.repeats)]
    notes = [
        "Weights are compared to the last bit with those of a run that nothing happened to, by their bytes on disk."
    ]
    result.write(
        RESULT.stem,
        command=f"python -m benchmarks.faults --kills {options.kills} --kills-of-two {options.kills_of_two} "
        f"--repeats {options.repeats}",
        hardware=hardware.describe(),
        versions=hardware.versions(),
        rows=rows,
        notes=notes,
        folder=RESULT.parent,
    )


def _killed(bench: Bench, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    cases = [("1 process", 1, (), options.kills)]
    cases += [
        ("2 processes, ddp", 2, TWO, options.kills_of_two),
        ("2 processes, fsdp", 2, SHARDED, options.kills_of_two),
    ]
    for name, size, arguments, kills in cases:
        if not kills:
            continue
        toll = Campaign(bench.workers, bench.recipe, "train", bench.fresh(), size, arguments, limit_s=LIMIT_S).run(
            kills
        )
        where = ", ".join(f"{count} {point}" for point, count in sorted(toll.kills.items()))
        print(name, toll, flush=True)
        yield {
            "fault": f"SIGKILL of a process ({where})",
            "run": name,
            "times": toll.kills.total(),
            "what happened": f"{toll.exact} of {toll.finished} runs that came to their end have the same weights",
            "lost": "nothing" if not toll.lost and toll.exact == toll.finished else "; ".join(toll.lost) or "bits",
            "seconds": round(toll.seconds),
        }


def _stopped(bench: Bench, repeats: int) -> Iterator[dict[str, Any]]:
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

            did = f"step finished and saved, exit code {code} of all, resumed to the undisturbed weights"
            yield _row(f"{number.name} to the last process", size, repeats, stop, did)


def _damaged(bench: Bench, repeats: int) -> Iterator[dict[str, Any]]:
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

    did = "named in a warning, the one before it taken, resumed to the undisturbed weights"
    cut = lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])  # noqa: E731
    yield _row("newest checkpoint cut in half", 1, repeats, lambda: damage(cut), did)
    yield _row("one bit of the newest checkpoint flipped", 1, repeats, lambda: damage(flip), did)

    def freeze() -> bool:
        run = bench.fresh()
        world = bench.start(run, 2)
        bench.until_saved(world, run)
        world.send(signal.SIGSTOP, rank=1)
        world.processes[0].join(120)
        ended = world.processes[0].exitcode == 1 and "rank 1 (process" in world.said()
        world.send(signal.SIGKILL, rank=1)
        world.wait(LIMIT_S)
        return ended and bench.start(run, 2).wait(LIMIT_S) == [0, 0] and bench.weights(run) == two

    two = bench.whole(2)
    did = "the other names it and ends within 120 s (silence_s 20), resumed to the undisturbed weights"
    yield _row("SIGSTOP of a process: frozen, not dead", 2, repeats, freeze, did)


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


def render(data: dict[str, Any]) -> str:
    """The page of a result."""
    head = ["fault", "run", "times", "what happened", "lost"]
    lines = [
        "<!-- Made by `python -m benchmarks.faults --page` of benchmarks/faults.json; change the words there. -->",
        "# What happens when something happens",
        "",
        "Faults that were done to real runs on purpose, how often, and what was lost. "
        f"By `{data['command']}` on {data['date']}: {data['hardware']['cpu']}, no GPU; the processes talked over gloo.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + " --- |" * len(head),
        *("| " + " | ".join(str(row[key]) for key in head) + " |" for row in data["rows"]),
        "",
        *data["notes"],
        "",
        "[multi-gpu.md](multi-gpu.md) has the exit codes. A loss or gradient that is not finite is passed over, its "
        "text kept in `bad-batches/`, and `max_skipped_steps` in a row end the run; a full disk ends it with one line, "
        "and the checkpoint before stays (both are held by the tests).",
        "",
        "Not tried: GPUs and NCCL, several machines, a network that fails, a disk that lies about what it has synced.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
