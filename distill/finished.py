"""Which stages of a run are finished, and whether what they left is still what it was.

A result that is gone or damaged is made again, after what is left of it has been moved aside. Where a stage that is to
run would read what somebody may have edited, the run is refused: only its owner knows which of the two is meant.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill.core.artifact import fingerprint, hash_of
from distill.core.errors import InputError, RecipeError
from distill.core.outside import is_file
from distill.core.run_folder import DONE, RECIPE, Run
from distill.core.seal import Change
from distill.data.files import fingerprint as fingerprint_of_files
from distill.models.load import check_reachable
from distill.stages.base import SELF, StageSpec
from distill.stages.session import Session
from distill.stages.text import data_of, made_sources


@dataclass
class Standing:
    """How a run stands before it goes on.

    Attributes:
        todo: the stages that are gone through, finished ones too.
        awaited: those of them that will run.
        hashes: those before them -> hash of what they read and made.
        lost: finished stages whose result is not whole -> what has become of it.
    """

    todo: list[str]
    awaited: list[str] = field(default_factory=list)
    hashes: dict[str, str] = field(default_factory=dict)
    lost: dict[str, list[Change]] = field(default_factory=dict)


def standing(session: Session, only: str | None, start: str | None, *, read: bool = True) -> Standing:
    """What is to be done, and what of the finished stages is lost.

    Args:
        session: of the run.
        only: the one stage to run; those before it must be finished.
        start: the first of the stages that are run again.
        read: whether to read every byte of what a stage to run will read; else only what was written to since. What
            no stage will read is never read unless it was written to.

    Raises:
        InputError: a stage before ``only`` is not finished or not whole, a result that will be read may have been
            edited, or a model from outside cannot be reached.
        RecipeError: some stages that will run lack packages.
    """
    names = list(session.stages)
    before = names[: names.index(only)] if only is not None else []
    found = Standing(names) if only is None else Standing([only], hashes=_finished_before(session, only))
    again = {only} if only is not None else {*names[names.index(start) :]} if start is not None else set()
    while True:
        to_run, stay = _divided(session, found, {*again, *found.lost})
        wanted = {reference for name in to_run for reference in reads(session, name)}
        lost = _lost(session, [*(name for name in before if name in wanted), *stay], wanted, read=read)
        if not lost:
            break
        if only is not None:
            lines = [line for name, changes in lost.items() for line in session.run.refusals(name, changes)]
            raise InputError("\n".join(lines))
        found.lost |= lost
    pairs = [(name, session.stages[name].missing()) for name in to_run]
    if mistakes := [f"{session.recipe}: stages.{name}: {missing}" for name, missing in pairs if missing is not None]:
        raise RecipeError(mistakes)
    for reference in sorted(wanted - {*names, SELF} - ({"teacher"} if session.teacher is None else set())):
        check_reachable(session.artifact(reference).location)
        _check_other_run(session, reference, read=read)
    for augment in (data_of(session.stages, session.data, name).augment for name in to_run):
        if augment is not None:
            check_reachable(session.artifact(augment.replace_words.model).location)
            _check_other_run(session, augment.replace_words.model, read=read)
    found.awaited = to_run
    return found


def _divided(session: Session, found: Standing, again: set[str]) -> tuple[list[str], list[str]]:
    """The stages that will run, and those that are finished and stay as they are."""
    to_run, stay, fresh = [], [], dict(found.hashes)
    for name in found.todo:
        stage, done = session.stages[name], session.run.done(name) if name not in again else None
        is_based = all(reference in fresh for reference in reads(session, name) if reference in session.stages)
        input_hash = hash_of_inputs(session, name, fresh) if done is not None and is_based else None
        if done is None or done.input_hash != input_hash or stage.outdated(done.figures) is not None:
            to_run.append(name)
        else:
            fresh[name] = f"{input_hash} {done.made}"
            stay.append(name)
    return to_run, stay


def _lost(session: Session, finished: Iterable[str], wanted: set[str], *, read: bool) -> dict[str, list[Change]]:
    """Finished stages whose result is gone or damaged.

    Raises:
        InputError: one that is wanted may have been edited.
    """
    lost, refusals = {}, []
    for name in finished:
        result, for_people = result_of(session, name)
        if result is None:
            continue
        is_read = name in wanted and not for_people
        changes = session.run.changes(name, result, read=read and is_read)
        if broken := [change for change in changes if change.kind in ("gone", "damaged")]:
            lost[name] = broken
        elif is_read:
            refusals += session.run.refusals(name, changes)
    if refusals:
        raise InputError("\n".join(refusals))
    return lost


def check_read(session: Session, name: str) -> None:
    """Refuse a stage's inputs that have changed since the stages which made them were finished.

    Raises:
        InputError: with a line for each file.
    """
    for reference in dict.fromkeys(reads(session, name)):
        if reference not in session.stages:
            if reference != SELF and (reference != "teacher" or session.teacher is not None):
                _check_other_run(session, reference, read=True)
        elif session.run.done(reference) is not None:
            result, for_people = result_of(session, reference)
            if result is not None and not for_people:
                session.run.check(reference, result)


def _check_other_run(session: Session, reference: str, *, read: bool) -> None:
    """Refuse a model that a stage of another run made, if it has changed since.

    Raises:
        InputError: with a line for each file.
    """
    model = Path(session.artifact(reference).location)
    stage = model.parent
    if is_file(stage / DONE) and is_file(stage.parent / RECIPE):  # other programs leave a DONE too
        try:
            Run(stage.parent).check(stage.name, model.name, read=read)
        except InputError as error:
            raise InputError("\n".join(f"{line} in {stage.parent}" for line in str(error).splitlines())) from None


def result_of(session: Session, name: str) -> tuple[str | None, bool]:
    """What a finished stage is run for, within its folder, and whether people read that and no stage does."""
    stage, done = session.stages[name], session.run.done(name)
    assert done is not None
    return stage.result(done.figures), stage.shown(done.figures) is not None


def reads(session: Session, name: str) -> Sequence[str]:
    """References of all models, and names of stages with rows, that the result of a stage depends on."""
    names = list(session.stages)
    makers = [source.stage for source in made_sources(data_of(session.stages, session.data, name))]
    return [*session.stages[name].reads(names[: names.index(name)]), *dict.fromkeys(makers)]


def refuse_to_begin_anew(session: Session, found: Standing) -> None:
    """Look ahead, as long as a recipe's stages are done.

    Raises:
        InputError: a training was left in the middle, and what it reads has changed since or is made again.
    """
    the_run, hashes = session.run, dict(found.hashes)
    for number, name in enumerate(found.todo):
        input_hash, done = hash_of_inputs(session, name, hashes), the_run.done(name)
        left = next((later for later in found.todo[number:] if the_run.is_left(later)), None)
        if name in found.lost and left is not None:
            raise InputError(
                f"{found.lost[name][0].line(the_run.stage(name), name)}, and {left}, which was left in the middle of a "
                f"training, would start again; restore it, or discard the saved progress with --from {name}"
            )
        if not the_run.has_begun(name, input_hash) and left is not None:
            raise InputError(
                f"stages.{name}: what it reads (its keys, the text or a model) has changed, and {left}, which was "
                "left in the middle of a training, would start again; restore it, choose another --run-dir, or "
                f"discard the saved progress with --from {name}"
            )
        if name in found.lost or done is None or done.input_hash != input_hash:
            return
        hashes[name] = f"{input_hash} {done.made}"


def _finished_before(session: Session, only: str) -> dict[str, str]:
    """Hashes of the stages before ``only``.

    Raises:
        InputError: one of them is not finished.
    """
    hashes: dict[str, str] = {}
    names = list(session.stages)
    for name in names[: names.index(only)]:
        input_hash, done = hash_of_inputs(session, name, hashes), session.run.done(name)
        if done is None or done.input_hash != input_hash:
            raise InputError(
                f"--only {only}: stage {name!r} before it is not finished in {session.run.folder}; run it first"
            )
        hashes[name] = f"{input_hash} {done.made}"
    return hashes


def hash_of_inputs(session: Session, name: str, hashes: dict[str, str]) -> str:
    """Hash of all that a stage's result depends on; machine settings are not among it."""
    stage: StageSpec = session.stages[name]
    read: list[Any] = []
    for reference in reads(session, name):
        if reference != "teacher" or session.teacher is not None:
            read.append(hashes.get(reference) or fingerprint(session.artifact(reference).location))
    own = session.of_text(data_of(session.stages, session.data, name))
    files = [fingerprint_of_files(stage.files())] if stage.files() else []
    return hash_of(stage.model_dump(mode="json", exclude={"data"}), read, [own.data_hash, session.seed], *files)
