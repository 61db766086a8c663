"""Checks that several stages make of the known configs, so that nobody waits hours for a refusal."""

from __future__ import annotations

from collections.abc import Sequence

from distill.core.errors import InputError
from distill.data.made import Made
from distill.losses import AnyLossSpec, StateLossSpec
from distill.models.configs import count, positions_of
from distill.models.head_names import task_in
from distill.models.load import Task, another_task, locate
from distill.models.states import Shapes, pairs_of
from distill.pretrained import token_names
from distill.pruning.layout import Config
from distill.stages.base import SELF, StageSpec, View
from distill.training.ends import agreed_ends, note_of_ends
from distill.training.spec import BudgetSpec, DistillSpec, split_batch


def check_task(
    stage: StageSpec,
    view: View,
    tasks: Sequence[Task] | None = None,
    starts: Sequence[str] = (),
    also: Sequence[str] = (),
) -> None:
    """Refuse models with another head than the recipe's task needs.

    Args:
        stage: whose references are looked at.
        view: of the stage.
        tasks: heads that the stage can use; None: that of the recipe's task.
        starts: keys of the stage that name models which may lack the head, as training gives them one or needs none.
        also: models that the stage reads without naming them.

    Raises:
        InputError: a model has another one.
    """
    task = view.data.task
    named = [(path[0], reference) for path, reference in stage.references()]
    for key, reference in [*named, *(("", reference) for reference in also)]:
        config = view.config(reference) or {}
        if not task.is_causal and "model_type" not in config:
            continue  # not on this machine; it is looked at when it is loaded
        own = task_in(config)
        allowed: Sequence[Task] = tasks or (task.head,)
        is_encoder = not task.is_causal and own != "causal_lm"
        if tasks is None and is_encoder and (task.head == "embedding" or key in starts):
            continue
        if own not in allowed:
            kind = str(config.get("model_type"))
            if tasks is not None:
                raise another_task(reference, kind, own)
            if task.is_causal:
                raise another_task(reference, kind, own, "needs a task in the recipe, such as task: masked_lm")
            if own == "causal_lm":
                raise another_task(reference, kind, own, f"cannot be used with task: {task.kind}; use an encoder")
            raise another_task(
                reference, kind, own, f"has no head for task: {task.kind}; train one first, by kind: finetune"
            )


def refuse_task(view: View, what: str, fix: str = "remove it") -> None:
    """Refuse what only models that predict the next token can do.

    Args:
        view: of the stage.
        what: the stage or its key.
        fix: what to do about it.

    Raises:
        InputError: the recipe's task is another.
    """
    if not view.data.task.is_causal:
        raise InputError(f"{what} cannot be used with task: {view.data.task.kind}; {fix}")


def check_sizes(budget: BudgetSpec, view: View, config: Config | None) -> None:
    """Refuse a batch that does not split, and sequences longer than the student's positions.

    Args:
        budget: of the stage; a budget of 0 is never refused.
        view: of the stage.
        config: the student's, where it is known.

    Raises:
        InputError: they do not fit.
    """
    length = view.data.sequence_length
    if not budget.steps(length):
        return
    split_batch(budget, view.compute, view.compute.known_processes())
    if not view.data.task.is_causal and view.compute.strategy == "fsdp":
        raise InputError(f"compute.strategy: fsdp cannot be used with task: {view.data.task.kind}; use ddp")
    positions = positions_of(config)
    if positions is not None and length > positions:
        raise InputError(f"data.sequence_length ({length}) is longer than the model's {positions} positions; lower it")


def check_states(losses: Sequence[AnyLossSpec], view: View, student: str, teacher: str) -> None:
    """Refuse losses on inner states that the two models cannot have, where their shapes are known.

    Args:
        losses: of the stage.
        view: of the stage.
        student: reference of the student.
        teacher: reference of the teacher, or "self".

    Raises:
        InputError: a layer that is not there, or heads that do not divide.
    """
    on_states = [loss for loss in losses if isinstance(loss, StateLossSpec)]
    if not on_states or teacher == SELF:
        return
    configs = [view.config(reference) for reference in (student, teacher)]
    ours, theirs = (Shapes.of(c) if c is not None and count(c) is not None else None for c in configs)
    if ours is not None and theirs is not None:
        for loss in on_states:
            pairs_of(loss, ours, theirs)


def check_ends(stage: StageSpec, budget: DistillSpec, view: View) -> None:
    """Refuse a student and a teacher that do not end a text alike, where the student is to write its own.

    Turns of a conversation end as the chat template has it, which is checked when that is read.

    Args:
        stage: whose references are student and teacher.
        budget: of the stage.
        view: of the stage.

    Raises:
        InputError: they do not, by their configs.
    """
    if budget.on_policy is not None and not view.data.holds_conversations:
        ends = [(view.config(reference) or {}).get("eos_token_id") for _, reference in stage.references()]
        if len(ends) == 2 and None not in ends:
            agreed_ends(*ends)


def check_documents(budget: DistillSpec, view: View) -> None:
    """Refuse a teacher that is to read documents where it cannot, or where all rows are made by stages without them.

    Args:
        budget: of the stage.
        view: of the stage.

    Raises:
        InputError: no row will have a document, or the teacher is sharded.
    """
    if budget.teacher_reads != "document":
        return
    if view.compute.strategy == "fsdp":
        raise InputError("teacher_reads: document cannot be used with compute.strategy: fsdp; use ddp")
    sources = [source for _, source in view.data.sources()]
    makers = list(dict.fromkeys(source.stage for source in sources if isinstance(source, Made)))
    is_made = all(isinstance(source, Made) for source in sources)
    if is_made and not any(view.stages[name].made_documents for name in makers if name in view.stages):
        raise InputError(
            f"teacher_reads: document: the rows of {', '.join(makers)} have no document; name a stage with make: qna "
            "and files of knowledge under data, or set teacher_reads: text"
        )


def note_on_ends(student: str, teacher: str, view: View) -> list[str]:
    """A line where student and teacher end a text by different tokens, by their configs; none where they do not.

    Args:
        student: reference of the model that is trained.
        teacher: reference of its teacher, or of the teacher's cache.
        view: of the stage.
    """
    if view.data.holds_conversations:  # whose turns end as the chat template has it
        return []
    signal = view.known[teacher].signal if teacher in view.known else None
    places = [student, signal.teacher if signal is not None else teacher]
    ours, theirs = ((view.config(place) or {}).get("eos_token_id") for place in places)
    if note_of_ends(ours, theirs) is None:
        return []
    outside = [view.teacher or "" if place == "teacher" else place for place in places if place not in view.stages]
    names = [token_names(locate(place)) for place in outside]
    note = note_of_ends(ours, theirs, {id_: token for named in names for id_, token in named.items()})
    return [] if note is None else [note]


def check_own_teacher(teacher: str, lora: object, *, silent: bool) -> None:
    """Refuse ``teacher: self`` where the student cannot be it.

    Args:
        teacher: of a stage.
        lora: of it, or None.
        silent: whether the student starts as its own teacher exactly and no loss of the stage looks at the text.

    Raises:
        ValueError: with one line.
    """
    if teacher != SELF:
        return
    if lora is None:
        raise ValueError(
            "teacher: self is the student as it starts, which only adapters keep; add lora: {}, or name the model that "
            "the student starts from (it is then loaded a second time)"
        )
    if silent:
        raise ValueError(
            "teacher: self teaches nothing here, as student and teacher start the same; add a loss on the text "
            "(cross_entropy) or name another teacher"
        )
