"""Walks the stages of a recipe: skips what is finished, goes on with what was interrupted."""

from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from distill.core.artifact import fingerprint, hash_of, write_text
from distill.core.errors import DistillError, InputError, MachineError
from distill.core.run import CHECKPOINTS, RECIPE, Done, Run, sizes_of
from distill.recipe import Recipe
from distill.stages.base import Session, StageContext, StageSpec


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
        InputError: the recipe, the models or the data are wrong; nothing is lost.
        MachineError: the machine is at fault.
        Interrupted: the user asked to stop; the same call goes on.
    """
    folder = Path(run_dir) if run_dir is not None else Path("runs") / recipe.name
    names = list(recipe.stages)
    for flag, name in (("--only", only), ("--from", start)):
        if name is not None and name not in names:
            raise InputError(f"{flag} {name}: no such stage (stages: {', '.join(names)})")
    the_run = Run(folder)
    with the_run.lock():
        session = _session(recipe, the_run, say, command)
        hashes: dict[str, str] = {}
        say(f"{recipe.name}: {len(names)} stages into {folder}")
        for name in [only] if only is not None else names[names.index(start) :] if start is not None else []:
            the_run.forget(name)
        try:
            for number, name in enumerate(names, 1):
                if name == (only or names[0]):  # what comes before may still refuse, and then the old recipe stands
                    write_text(folder / RECIPE, recipe.dump())
                if only is not None and number > names.index(only) + 1:
                    break
                input_hash = _input_hash(session, name, hashes)
                if only is not None and name != only:
                    _require_done(the_run, name, input_hash, only)
                else:
                    _run_stage(session, name, input_hash, f"[{number}/{len(names)}]")
                hashes[name] = f"{input_hash} {_done(the_run, name).made}"
        finally:
            session.close()
    return the_run


def _session(recipe: Recipe, the_run: Run, say: Callable[[str], None], command: str | None) -> Session:
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
    )


def _run_stage(session: Session, name: str, input_hash: str, number: str) -> None:
    """One stage: skipped when its marker fits, else run and marked."""
    stage, done = session.stages[name], session.run.done(name)
    title = f"{number} {name}" + (f" ({stage.kind})" if stage.kind != name else "")
    if done is not None and stage.makes_model and not _has_weights(session, name):
        session.say(f"{title}: its model is not whole any more, so it is made again")
        session.run.forget(name)
        done = None
    if done is not None and done.input_hash == input_hash:
        session.say(f"{title}: finished before, {done.seconds:.0f} s")
        return
    session.say(title)
    folder = session.run.begin(name, input_hash, session.say)
    (folder / "DONE").unlink(missing_ok=True)
    started = time.perf_counter()
    torch.manual_seed(int(hash_of(session.seed, name), 16) % 2**63)  # dropout and new adapters, whatever ran before
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


def _has_weights(session: Session, name: str) -> bool:
    """Whether the files of a finished stage's model are all there, as long as they were."""
    folder = session.run.stage(name) / "model"
    done = session.run.done(name)
    return done is not None and folder.is_dir() and done.sizes == sizes_of(folder)


def _done(the_run: Run, name: str) -> Done:
    done = the_run.done(name)
    assert done is not None
    return done


def _require_done(the_run: Run, name: str, input_hash: str, only: str) -> None:
    done = the_run.done(name)
    if done is None or done.input_hash != input_hash:
        raise InputError(f"--only {only}: stage {name!r} before it is not finished in {the_run.folder}; run it first")


def _input_hash(session: Session, name: str, hashes: dict[str, str]) -> str:
    """Hash of all that a stage's result depends on; machine settings are not among it."""
    stage: StageSpec = session.stages[name]
    read: list[Any] = []
    for reference in stage.reads(list(hashes)):
        if reference != "teacher" or session.teacher is not None:
            read.append(hashes.get(reference) or fingerprint(session.artifact(reference).location))
    return hash_of(stage.model_dump(mode="json"), read, [session.data_hash, session.seed])
