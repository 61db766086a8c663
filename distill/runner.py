"""Walks the stages of a recipe: skips what is finished, goes on with what was interrupted."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import torch

from distill.core import stop
from distill.core.artifact import hash_of, write_text
from distill.core.errors import DistillError, InputError, MachineError, Stopped
from distill.core.outside import is_text
from distill.core.run_folder import DONE, RECIPE, SCORES_FOLDER, Run
from distill.core.secrets import redacted
from distill.core.source import flat, parse, read
from distill.core.world import SINGLE_PROCESS, World
from distill.finished import Standing, check_read, hash_of_inputs, refuse_to_begin_anew, standing
from distill.launch import LOGS, check_world, launch, wanted_processes
from distill.models.release import give_back_memory
from distill.recipe import Recipe
from distill.required import check_required
from distill.stages.session import RankDone, Session, StageContext
from distill.stages.text import data_of
from distill.tracking.hardware import SAMPLES, HardwareLog
from distill.training.ranks import Ranks, meet

ERROR_GRACE_S = 10.0
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
        NotReached: all is done and saved, and a figure does not reach what the recipe requires.
        Interrupted: the user asked to stop; the same call goes on.
        Preempted: so did the machine, by SIGTERM, SIGUSR1 or SIGHUP.
        RankEnded: one of several processes that were started here ended badly.
    """
    folder = Path(run_dir) if run_dir is not None else Path("runs") / recipe.name
    if not is_text(str(folder)):
        raise InputError(f"--run-dir {str(folder)!r}: is no text in UTF-8, and the run writes it down; choose another")
    place = os.path.abspath(folder).replace(":/", "://")  # a path has one slash where a URL had two
    if redacted(place) != place:
        raise InputError(
            "--run-dir: its path holds a password or token, and the run prints it and writes it down; choose another "
            "folder"
        )
    names = list(recipe.stages)
    for flag, name in (("--only", only), ("--from", start)):
        if name is not None and name not in names:
            raise InputError(f"{flag} {name}: no such stage (stages: {', '.join(names)})")
    if only is not None and start is not None:
        raise InputError(
            f"--only {only} and --from {start}: one stage alone, or it and those after it; give one of them"
        )
    with stop.listening(), stop.patient():
        return _run(recipe, Run(folder), only, start, say, command)


def _run(
    recipe: Recipe, the_run: Run, only: str | None, start: str | None, say: Callable[[str], None], command: str | None
) -> Run:
    """In this process, or in as many as the recipe asks for."""
    stop.check()
    world = World.joined()
    if world is None and (num_processes := wanted_processes(recipe.compute)) > 1:
        with the_run.lock():  # what is refused is refused before anything is started
            standing(_session(recipe, the_run, say, command, SINGLE_PROCESS), only, start, read=False)
        folder = the_run.folder
        order = {"recipe": recipe.dump(), "run_dir": str(folder), "only": only, "start": start, "command": command}
        say(f"{num_processes} processes: the first speaks here, the others in {folder / LOGS}/rank-N.log")
        launch(num_processes, order, folder)
        stop.finish()
        return the_run
    if world is not None:
        check_world(recipe.compute, world)
    from distill.training.trainer import resolve_device  # Lightning, which takes seconds to import

    world, device = world or SINGLE_PROCESS, resolve_device(recipe.compute)
    with meet(world, recipe.compute.silence_s, device) as ranks:
        session = _session(recipe, the_run, say if world.rank == 0 else _silent, command, world)
        if world.rank and ranks is not None:
            _follow(session, ranks)
        else:
            try:
                _lead(session, ranks, only, start)
            except (DistillError, Stopped) as error:
                if ranks is not None:
                    ranks.share_stop()  # the error may be that another one was stopped
                    ranks.tell({"exit": stop.exit_code(error.exit_code)})
                    ranks.leave(ERROR_GRACE_S)
                raise
    return the_run


def _lead(session: Session, ranks: Ranks | None, only: str | None, start: str | None) -> None:
    """Walk the stages; other processes are told of those that they share in."""
    the_run, names, say = session.run, list(session.stages), session.say
    if ranks is not None:
        session.gather = lambda reader: _call_to_tokenize(session, ranks, reader)
    with the_run.lock():
        the_run.tidy([*names, SCORES_FOLDER], say)
        found = standing(session, only, start)
        _rehearse(session, found.awaited)
        say(f"{session.recipe}: {len(names)} stage{'s' * (len(names) > 1)} into {the_run.folder}")
        for line in _changes(the_run.folder / RECIPE, session.text):
            say(f"  changed since it last ran: {line}")
        for name in [only] if only is not None else names[names.index(start) :] if start is not None else []:
            the_run.forget(name)
        refuse_to_begin_anew(session, found)
        write_text(the_run.folder / RECIPE, session.text)  # only now: what is refused leaves the old one alone
        log = HardwareLog(the_run.folder / SAMPLES) if session.logging.hardware and found.awaited else None
        if log is not None:
            log.start()
        try:
            for name in stop.stoppable(found.todo):
                with log.of(name) if log is not None else nullcontext():
                    _run_stage(session, ranks, name, found)
            stop.finish()
        finally:
            if log is not None:
                log.stop()
            session.close()
        if only is None:
            check_required(session)
    if ranks is not None:
        ranks.tell(None)


def _rehearse(session: Session, names: list[str]) -> None:
    """Try the ends of stages before the first of them starts.

    Raises:
        InputError: one would fail by the user's files.
        MachineError: one would fail by the machine.
    """
    for name in names:
        stage = session.stages[name]
        with _named(name):
            stage.rehearse(StageContext(session.of_stage(name), name, session.run.stage(name), ""))


def _call_to_tokenize(session: Session, ranks: Ranks, reader: Session) -> None:
    """Tell the other processes to open the text of a session too, so that each tokenizes a part of it."""
    for name in session.stages:
        if _reader_of(session, name, is_cut=reader.is_cut) is reader:
            ranks.tell({"text": name, "is_cut": reader.is_cut})
            return


def _reader_of(session: Session, name: str, *, is_cut: bool) -> Session:
    """The session that reads the text of a stage, in the run's tokens or in those of a model with a part of them."""
    return session.of_stage(name) if is_cut else session.of_text(data_of(session.stages, session.data, name))


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Say in an error of which stage it is."""
    try:
        yield
    except (DistillError, Stopped) as error:
        error.args = (f"stages.{name}: {error}",)
        raise


def _follow(session: Session, ranks: Ranks) -> None:
    """Any process but the first: share in the stages that are told of, and wait meanwhile."""
    while (order := ranks.hear()) is not None:
        if "exit" in order:
            ranks.leave()
            raise SystemExit(stop.exit_code(order["exit"]))  # the first has said why
        if "text" in order:
            with suppress(InputError):  # the first process finds the same mistake, and says so
                _reader_of(session, order["text"], is_cut=order["is_cut"]).corpus()
            continue
        name, input_hash = order["stage"], order["input_hash"]
        _seed(session, name)
        try:
            stage = session.stages[name]
            stage.run(StageContext(session.of_stage(name), name, session.run.stage(name), input_hash))
        except RankDone:
            give_back_memory()
            continue
        raise AssertionError(f"stages.{name}: rank {ranks.world.rank} was not released")
    stop.finish()


def _silent(line: str) -> None:
    """What a process says that does not speak for all."""


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
        # the report shows it, and a path may hold what the environment keeps secret
        command=redacted(command or f"distill run {shlex.quote(str(the_run.folder / RECIPE))}"),
        say=say,
        world=world,
        require=recipe.require,
    )


def _run_stage(session: Session, ranks: Ranks | None, name: str, found: Standing) -> None:
    """One stage: skipped when its marker fits, else run and marked."""
    names, stage, the_run = list(session.stages), session.stages[name], session.run
    input_hash = hash_of_inputs(session, name, found.hashes)
    title = f"[{names.index(name) + 1}/{len(names)}] {name}" + (f" ({stage.kind})" if stage.kind != name else "")
    if name in found.lost:
        line, *others = [change.line(the_run.stage(name), name) for change in found.lost[name]]
        more = f" and {len(others)} more" if others else ""
        session.say(f"{title}: {line}{more}; what is left of it is now {the_run.set_aside(name).name}")
    done = the_run.done(name)
    if done is not None and done.input_hash == input_hash:
        if (why := stage.outdated(done.figures)) is None:
            session.say(f"{title}: {_finished(session, name)}")
            the_run.drop_checkpoints(name)  # of a run that was killed before it could
            found.hashes[name] = f"{input_hash} {done.made}"
            return
        title += f": {why}"
    session.say(title)
    check_read(session, name)
    folder = the_run.begin(name, input_hash, session.say)
    (folder / DONE).unlink(missing_ok=True)
    started = time.perf_counter()
    context = StageContext(session.of_stage(name), name, folder, input_hash)
    if stage.makes_model:
        with _named(name):
            stage.rehearse(context)
    _seed(session, name)
    if ranks is not None and stage.takes_all_ranks():
        ranks.tell({"stage": name, "input_hash": input_hash})
    try:
        with _named(name):
            figures = stage.run(context)
    except torch.OutOfMemoryError as error:
        raise MachineError(
            f"stages.{name}: out of GPU memory; lower its batch sizes or compute.micro_batch_size"
        ) from error
    give_back_memory()
    stop.confirm()
    done = the_run.finish(name, input_hash, round(time.perf_counter() - started, 3), figures)
    found.hashes[name] = f"{input_hash} {done.made}"
    session.say(f"  done in {done.seconds:.0f} s")


def _finished(session: Session, name: str) -> str:
    """In words: what a finished stage took, where its result is, and what of its files is not as it left them."""
    stage, done = session.stages[name], session.run.done(name)
    assert done is not None
    shown, result = stage.shown(done.figures), stage.result(done.figures)
    changes = session.run.changes(name, read=False)
    changes += [change for change in session.run.changes(name, result or "", read=False) if change.kind == "added"]
    changed = f"; changed since: {', '.join(change.name for change in changes)}" if changes else ""
    place = f": {session.run.stage(name) / shown}" if shown else ""
    return f"finished before, {done.seconds:.0f} s{place}{changed}"


def _seed(session: Session, name: str) -> None:
    """Dropout and new adapters, whatever ran before."""
    torch.manual_seed(int(hash_of(session.seed, name), 16) % 2**63)


def _changes(file: Path, text: str) -> list[str]:
    """Key by key what a recipe says that the one in ``file`` does not, or otherwise."""
    try:
        before, now = flat(read(file).data), flat(parse(text, str(file)).data)
    except InputError:  # there is none, or somebody has written into it
        return []
    keys = [key for key in dict.fromkeys([*before, *now]) if before.get(key) != now.get(key)]
    return [f"{key}: {before.get(key, 'unset')} -> {now.get(key, 'unset')}" for key in keys]
