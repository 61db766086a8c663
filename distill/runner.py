"""Walks the stages of a recipe: skips what is finished, goes on with what was interrupted."""

from __future__ import annotations

import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml

from distill.core.artifact import fingerprint, hash_of, write_text
from distill.core.errors import DistillError, InputError, Interrupted, MachineError, Preempted, RecipeError
from distill.core.run import CHECKPOINTS, RECIPE, Done, Run, sizes_of
from distill.core.world import ALONE, World
from distill.launch import LOGS, check_world, launch, wanted_processes
from distill.recipe import Recipe
from distill.stages.base import SELF, Released, Session, StageContext, StageSpec
from distill.training.ranks import Ranks, meet

FAREWELL_S = 10.0
"""Seconds that the first process, where the others met by it, stays after an error so that they hear of it."""


def run(
    recipe: Recipe,
    run_dir: str | Path | None = None,
    *,
    only: str | None = None,
    start: str | None = None,
    say: Callable[[str], None] = print,
    command: str | None = None,
) -> Run:
    """Run a recipe, or go on with it.

    Args:
        recipe: what to do.
        run_dir: the run's folder; unset: ``runs/<recipe name>``.
        only: run this stage alone; those before it must be finished.
        start: forget this stage and those after it and run them again; a run that is stopped goes on without it.
        say: prints one line for people.
        command: what the user typed, for the report.

    Returns:
        The run, whose folder holds every stage's result.

    Raises:
        InputError: the recipe, the models, the data or the arguments are wrong; nothing is lost.
        MachineError: the machine is at fault.
        Interrupted: the user asked to stop; the same call goes on.
        Preempted: so did the machine, by SIGTERM or SIGUSR1.
        RankEnded: one of several processes that were started here ended badly.
    """
    folder = Path(run_dir) if run_dir is not None else Path("runs") / recipe.name
    names = list(recipe.stages)
    for flag, name in (("--only", only), ("--from", start)):
        if name is not None and name not in names:
            raise InputError(f"{flag} {name}: no such stage (stages: {', '.join(names)})")
    if only is not None and start is not None:
        raise InputError(
            f"--only {only} and --from {start}: one stage alone, or it and those after it; give one of them"
        )
    the_run = Run(folder)
    world = World.joined()
    if world is None and (num_processes := wanted_processes(recipe.compute)) > 1:
        with the_run.lock():  # what is refused is refused before anything is started
            _planned(_session(recipe, the_run, say, command, ALONE), only, start)
        order = {"recipe": recipe.dump(), "run_dir": str(folder), "only": only, "start": start, "command": command}
        say(f"{num_processes} processes: the first speaks here, the others in {folder / LOGS}/rank-N.log")
        launch(num_processes, order, folder)
        return the_run
    if world is not None:
        check_world(recipe.compute, world)
    from distill.training.trainer import resolve_device  # Lightning, which takes seconds to import

    world, device = world or ALONE, resolve_device(recipe.compute)
    with _preemptible(), meet(world, recipe.compute.silence_s, device) as ranks:
        session = _session(recipe, the_run, say if world.rank == 0 else _silent, command, world)
        if world.rank and ranks is not None:
            _follow(session, ranks)
        else:
            try:
                _lead(session, ranks, only, start)
            except DistillError as error:
                if ranks is not None:
                    ranks.tell({"exit": error.exit_code})
                    ranks.leave(FAREWELL_S)
                raise
    return the_run


def _lead(session: Session, ranks: Ranks | None, only: str | None, start: str | None) -> None:
    """Walk the stages; other processes are told of those that they share in."""
    the_run, names, say = session.run, list(session.stages), session.say
    with the_run.lock():
        todo, hashes = _planned(session, only, start)
        say(f"{session.recipe}: {len(names)} stages into {the_run.folder}")
        for line in _changes(the_run.folder / RECIPE, session.text):
            say(f"  changed since it last ran: {line}")
        for name in [only] if only is not None else names[names.index(start) :] if start is not None else []:
            the_run.forget(name)
        _refuse_to_begin_anew(session, todo, hashes)
        write_text(the_run.folder / RECIPE, session.text)  # only now: what is refused leaves the old one alone
        try:
            for name in todo:
                input_hash = _input_hash(session, name, hashes)
                _run_stage(session, ranks, name, input_hash, f"[{names.index(name) + 1}/{len(names)}]")
                hashes[name] = f"{input_hash} {_done(the_run, name).made}"
        finally:
            session.close()
    if ranks is not None:
        ranks.tell(None)


def _planned(session: Session, only: str | None, start: str | None) -> tuple[list[str], dict[str, str]]:
    """The stages that are gone through, those of them that are finished too, and the hashes of those before.

    Raises:
        InputError: one before ``only`` is not finished, or a model from outside cannot be had.
        RecipeError: some that will be worked on lack packages.
    """
    from distill.models.load import check_reachable

    names = list(session.stages)
    todo, hashes = ([only], _finished_before(session, only)) if only is not None else (names, {})
    again = {*todo} if only is not None else {*names[names.index(start) :]} if start is not None else set()
    fresh = dict(hashes)  # of the stages that stay as they are
    mistakes: list[str] = []
    outside: set[str] = set()  # models that are no stage's and will be read
    for name in todo:
        done, stage = session.run.done(name), session.stages[name]
        reads = {*stage.reads(names[: names.index(name)])}
        stays = done is not None and name not in again and all(read in fresh for read in reads if read in names)
        if stays and done is not None and done.input_hash == (input_hash := _input_hash(session, name, fresh)):
            fresh[name] = f"{input_hash} {done.made}"
        else:
            outside |= reads.difference(names)
            if (missing := stage.missing()) is not None:
                mistakes.append(f"{session.recipe}: stages.{name}: {missing}")
    if mistakes:
        raise RecipeError(mistakes)
    for reference in sorted(outside - {SELF} - ({"teacher"} if session.teacher is None else set())):
        check_reachable(session.artifact(reference).location)
    return todo, hashes


def _follow(session: Session, ranks: Ranks) -> None:
    """Any process but the first: share in the stages that are told of, and wait meanwhile."""
    while (order := ranks.hear()) is not None:
        if "exit" in order:
            ranks.leave()
            raise SystemExit(order["exit"])  # the first has said why
        name, input_hash = order["stage"], order["input_hash"]
        _seed(session, name)
        try:
            stage = session.stages[name]
            stage.run(StageContext(session.speaking(stage.speaker()), name, session.run.stage(name), input_hash))
        except Released:
            continue
        raise AssertionError(f"stages.{name}: rank {ranks.world.rank} was not released")


def _silent(line: str) -> None:
    """What a process says that does not speak for all."""


@contextmanager
def _preemptible() -> Iterator[None]:
    """SIGTERM and SIGUSR1 end a run with an exit code of their own; while it trains the step is finished and saved."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return

    def stop(number: int, frame: Any) -> None:
        if isinstance(sys.exception(), Interrupted | Preempted):
            return  # already on the way out, and maybe telling W&B so
        raise Preempted(f"stopped by {signal.Signals(number).name}; the same command goes on from the last stage")

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _session(recipe: Recipe, the_run: Run, say: Callable[[str], None], command: str | None, world: World) -> Session:
    return Session(
        run=the_run,
        recipe=recipe.name,
        text=recipe.dump(),
        teacher=recipe.teacher,
        data=recipe.data,
        compute=recipe.compute,
        logging=recipe.logging,
        seed=recipe.seed,
        stages=dict(recipe.stages),
        command=command or f"distill run {shlex.quote(str(the_run.folder / RECIPE))}",
        say=say,
        world=world,
    )


def _run_stage(session: Session, ranks: Ranks | None, name: str, input_hash: str, number: str) -> None:
    """One stage: skipped when its marker fits, else run and marked."""
    stage, done = session.stages[name], session.run.done(name)
    title = f"{number} {name}" + (f" ({stage.kind})" if stage.kind != name else "")
    if done is not None and stage.makes_model and not _has_weights(session, name):
        session.say(f"{title}: its model is not whole any more, so it is made again")
        session.run.forget(name)
        done = None
    if done is not None and done.input_hash == input_hash:
        why, shown = stage.outdated(done.figures), stage.shown(done.figures)
        if why is None:
            place = f": {session.run.stage(name) / shown}" if shown else ""
            session.say(f"{title}: finished before, {done.seconds:.0f} s{place}")
            return
        title += f": {why}"
    session.say(title)
    folder = session.run.begin(name, input_hash, session.say)
    (folder / "DONE").unlink(missing_ok=True)
    started = time.perf_counter()
    _seed(session, name)
    if ranks is not None and stage.takes_all_ranks():
        ranks.tell({"stage": name, "input_hash": input_hash})
    try:
        figures = stage.run(StageContext(session.speaking(stage.speaker()), name, folder, input_hash))
    except torch.OutOfMemoryError as error:
        raise MachineError(
            f"stages.{name}: out of GPU memory; lower its batch sizes or compute.micro_batch_size"
        ) from error
    except DistillError as error:
        error.args = (f"stages.{name}: {error}",)
        raise
    seconds = time.perf_counter() - started
    session.run.finish(name, Done(input_hash, round(seconds, 3), figures, sizes=sizes_of(folder / "model")))
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)  # only now: until DONE stands they are what a kill leaves
    session.say(f"  done in {seconds:.0f} s")


def _seed(session: Session, name: str) -> None:
    """Dropout and new adapters, whatever ran before."""
    torch.manual_seed(int(hash_of(session.seed, name), 16) % 2**63)


def _has_weights(session: Session, name: str) -> bool:
    """Whether the files of a finished stage's model are all there, as long as they were."""
    folder = session.run.stage(name) / "model"
    done = session.run.done(name)
    return done is not None and folder.is_dir() and done.sizes == sizes_of(folder)


def _done(the_run: Run, name: str) -> Done:
    done = the_run.done(name)
    assert done is not None
    return done


def _refuse_to_begin_anew(session: Session, names: list[str], hashes: dict[str, str]) -> None:
    """Look ahead, as long as a recipe's stages are done.

    Raises:
        InputError: a training was left in the middle, and what it reads has changed since.
    """
    the_run, hashes = session.run, dict(hashes)
    for number, name in enumerate(names):
        input_hash, done = _input_hash(session, name, hashes), the_run.done(name)
        if not the_run.has_begun(name, input_hash):
            if left := next((later for later in names[number:] if the_run.is_left(later)), None):
                raise InputError(
                    f"stages.{name}: what it reads (its keys, the text or a model) has changed, and {left}, which was "
                    "left in the middle of a training, would begin anew; put it back, choose another --run-dir, or "
                    f"give up what is saved by --from {name}"
                )
            return
        if done is None or done.input_hash != input_hash:
            return
        hashes[name] = f"{input_hash} {done.made}"


def _changes(file: Path, text: str) -> list[str]:
    """Key by key what a recipe says that the one in ``file`` does not, or otherwise."""
    try:
        before, now = _flat(yaml.safe_load(file.read_text(encoding="utf-8"))), _flat(yaml.safe_load(text))
    except (OSError, ValueError, yaml.YAMLError):  # there is none, or somebody has written into it
        return []
    keys = [key for key in dict.fromkeys([*before, *now]) if before.get(key) != now.get(key)]
    return [f"{key}: {before.get(key, 'unset')} -> {now.get(key, 'unset')}" for key in keys]


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {key: value}
    return {k: v for name, part in value.items() for k, v in _flat(part, f"{key}.{name}".lstrip(".")).items()}


def _finished_before(session: Session, only: str) -> dict[str, str]:
    """Hashes of the stages before ``only``.

    Raises:
        InputError: one of them is not finished.
    """
    hashes: dict[str, str] = {}
    names = list(session.stages)
    for name in names[: names.index(only)]:
        input_hash, done = _input_hash(session, name, hashes), session.run.done(name)
        if done is None or done.input_hash != input_hash:
            raise InputError(
                f"--only {only}: stage {name!r} before it is not finished in {session.run.folder}; run it first"
            )
        hashes[name] = f"{input_hash} {done.made}"
    return hashes


def _input_hash(session: Session, name: str, hashes: dict[str, str]) -> str:
    """Hash of all that a stage's result depends on; machine settings are not among it."""
    stage: StageSpec = session.stages[name]
    read: list[Any] = []
    for reference in stage.reads(list(hashes)):
        if reference != "teacher" or session.teacher is not None:
            read.append(hashes.get(reference) or fingerprint(session.artifact(reference).location))
    return hash_of(stage.model_dump(mode="json"), read, [session.data_hash, session.seed])
