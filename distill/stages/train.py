"""The training that finetune, distill and quantize share: they differ by data, not by copied loops."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

from transformers import PreTrainedModel

from distill.core.artifact import fingerprint
from distill.core.errors import InputError
from distill.data.chat_spec import ChatSpec
from distill.data.corpus import Corpus
from distill.data.document_prompts import document_prompts
from distill.data.micro_batches import MicroBatches
from distill.data.packing import file_lock
from distill.data.tokenizer import load_tokenizer
from distill.evaluation.tasks.in_memory import ModelInMemory
from distill.losses.base import AnyLossSpec
from distill.models.lora import LoraSpec
from distill.models.new import NewModel
from distill.models.release import give_back_memory
from distill.models.sentence_files import read_length
from distill.stages.ask_every import AskEvery
from distill.stages.base import SELF
from distill.stages.cache_teacher.student import open_cache
from distill.stages.ends import differences
from distill.stages.layer_origins import origin_of
from distill.stages.models import (
    check_context_length,
    check_packing,
    hold_mask,
    load_frozen,
    save_plain,
    starting_model,
    stored_dtype_of,
)
from distill.stages.passes import passes_of
from distill.stages.rehearsal import check_room
from distill.stages.row_scores import losses_of_teacher
from distill.stages.session import RankDone, Session, StageContext
from distill.training.ask import Asked
from distill.training.assemble import Student, assemble, disassemble
from distill.training.document_teacher import DocumentTeacher
from distill.training.ends import agreed_ends, ends_of
from distill.training.live_teacher import LiveTeacher
from distill.training.module import DistillationModule
from distill.training.on_policy import OnPolicy
from distill.training.own_weights import OwnWeights
from distill.training.ranks import from_first, together
from distill.training.spec import BudgetSpec, DistillSpec, OnPolicySpec, split_batch
from distill.training.task_losses import validation_losses
from distill.training.teacher import Teacher
from distill.training.trainer import fit, resolve_device, resolve_teacher


def train_and_write(
    context: StageContext,
    budget: BudgetSpec,
    start: str | NewModel,
    losses: Sequence[AnyLossSpec],
    *,
    teacher: str | None = None,
    weights: Literal["pretrained", "random"],
    lora: LoraSpec | None,
    save_dtype: str,
    evaluate_every: AskEvery | None = None,
) -> dict[str, Any]:
    """Train a model in plain precision and write it as the stage's model.

    Args:
        context: of the stage.
        budget: how long.
        start: reference of the model to train, or a new one.
        losses: at least one.
        teacher: reference of the frozen teacher or of its cache, "self", or None.
        weights: "random" forgets those of the model.
        lora: adapters to train in place of the weights, or None.
        save_dtype: of the stored weights; "auto" is that of the model that training starts from.
        evaluate_every: what the model is asked while it trains; None: nothing.

    Returns:
        Figures, see :func:`train`.

    Raises:
        RankDone: in all processes but the first.
    """
    session = context.session
    model = starting_model(context, start, weights)
    mask, dtype = None, save_dtype.replace("auto", "float32")
    if isinstance(start, str):
        dtype = stored_dtype_of(session.artifact(start).location, save_dtype)
        mask = hold_mask(context, start, model, lora=lora is not None) if weights == "pretrained" else None
    student = assemble(model, lora=lora, gradient_checkpointing=session.compute.gradient_checkpointing)
    parent = start if isinstance(start, str) else "a new model"
    figures = train(context, student, losses, budget, teacher=teacher, start=parent, evaluate_every=evaluate_every)
    shown = start if teacher in (None, SELF) else teacher
    length = read_length(session.artifact(shown).location) if isinstance(shown, str) else None
    context.write_model(
        save_plain(disassemble(student), dtype, max_length=length),
        parent=parent,
        teacher=None if teacher is None else session.teacher_behind(parent if teacher == SELF else teacher),
        figures=figures,
        mask=mask,
    )
    return figures


def train(
    context: StageContext,
    student: Student,
    losses: Sequence[AnyLossSpec],
    budget: BudgetSpec,
    *,
    teacher: str | LiveTeacher | None,
    start: str | None = None,
    quantized_from_step: int = 0,
    freeze_scales: float | None = None,
    evaluate_every: AskEvery | None = None,
    scored_by: str | None = None,
) -> dict[str, Any]:
    """Train an assembled student in place, from the stage's last checkpoint if there is one.

    All processes of the run do it together; of several only the first comes back from it.

    Args:
        context: of the stage.
        student: what to train.
        losses: at least one.
        budget: how long; a budget of 0 does nothing.
        teacher: reference of the frozen teacher or of its cache, "self", one that is loaded, or None.
        start: reference of the model that the student starts from; needed with a reference of a teacher alone.
        quantized_from_step: steps that a fake-quantized student makes in full precision first.
        freeze_scales: share of the steps after which the scales of its weights stand still; None: they never do.
        evaluate_every: what the student is asked while it trains; None: nothing.
        scored_by: reference of a teacher that is loaded, whose loss may order the rows.

    Returns:
        Figures: steps, tokens, seconds of training, tokens per second.

    Raises:
        RankDone: in all processes but the first.
    """
    session, world = context.session, context.session.world
    budget, tokens_per_sequence = budget.for_rows(session.corpus().num_rows), session.corpus().tokens_per_sequence
    num_steps = budget.steps(tokens_per_sequence)
    if num_steps == 0:
        return {"training_steps": 0, "training_tokens": 0, "training_seconds": 0.0}
    times = passes_of(context, budget)
    learn_to_stop(context, student.model, session.corpus().stops)
    check_context_length(student.model, session.data.sequence_length)
    check_packing(context, student.model)
    if world.rank == 0:
        check_room(context, student.model)
    reference = teacher if isinstance(teacher, str) else None
    provenance = {"recipe, text and models": context.input_hash}
    if reference is not None and reference != SELF:
        provenance["teacher"] = fingerprint(session.artifact(reference).location)
    corpus, source = _corpus_and_teacher(context, student, teacher, num_steps * budget.batch_size)
    if isinstance(budget, DistillSpec) and budget.teacher_reads == "document" and source is not None:
        source = _with_documents(context, source)
    module = DistillationModule(
        student.model,
        losses,
        source,
        validation=validation_losses(session.data.task),
        on_policy=open_on_policy(context, budget, student.model, source, reference),
        optimizer=budget.optimizer,
        num_steps=num_steps,
        origin=origin_of(session, start, reference) if start is not None and reference is not None else None,
        quantized_from_step=quantized_from_step,
        held_from_step=None if freeze_scales is None else int(freeze_scales * num_steps),
        log=False,  # Record does
    )
    for line in module.states.summary() if module.states is not None else ():
        context.say(line)
    for line in differences(context, student.model, reference, session.corpus().stops) if start is not None else ():
        context.say(line)
    micro = split_batch(budget, session.compute, world.size)[0]
    num_sequences = num_steps * budget.batch_size
    judge = scored_by if reference is None else session.teacher_behind(str(start) if reference == SELF else reference)
    hardness = losses_of_teacher(context, judge, num_sequences, micro)
    if num_sorted := corpus.num_sorted(num_sequences):
        how = "short to long" if hardness is None else "easy to hard for the teacher"
        context.say(f"data.order: rows come from {how} for the first {num_sorted / budget.batch_size:,.0f} steps")
    with together(world, resolve_device(session.compute), context.name):
        hardness = from_first(hardness)  # of processes on several machines each has its own, equal but for rounding
        seconds = fit(
            module,
            budget,
            session.compute,
            name=context.name,
            folder=context.folder,
            tokens_per_sequence=tokens_per_sequence,
            train_loader=lambda micro, consumed: corpus.train_loader(
                MicroBatches(micro, consumed, world.rank, world.size),
                session.compute.num_workers,
                num_sequences,
                hardness,
            ),
            validation_loader=corpus.validation_loader(micro),
            logger=session.logger(),
            say=session.say,
            world=world,
            provenance=provenance,
            ask=None if evaluate_every is None else _asked(evaluate_every, student.model, session, micro),
        )
    if world.rank:
        raise RankDone
    is_planned, counted = module.on_policy is None, int(module.tokens_read)
    del module, source
    give_back_memory()
    planned = round(num_steps * budget.batch_size * tokens_per_sequence)
    tokens = planned if is_planned else counted
    figures = {"training_steps": num_steps, "training_tokens": tokens, "training_seconds": round(seconds, 1)}
    return figures | ({"passes": times} if times else {})


def _asked(every: AskEvery, model: PreTrainedModel, session: Session, micro: int) -> Asked:
    """What asks the student, with as many tokens at once as its training reads."""
    chat, tokens = session.data.chat or ChatSpec(), micro * session.data.sequence_length
    lm = ModelInMemory(model, session.tokenizer(), chat=chat, batch_tokens=tokens, gives_up=True)
    return Asked(every.num_steps, partial(every.ask, lm))


def _corpus_and_teacher(
    context: StageContext, student: Student, teacher: str | LiveTeacher | None, num_sequences: int
) -> tuple[Corpus, Teacher | None]:
    """The text, with a cached teacher's output in its batches, and the teacher that reads it."""
    session = context.session
    if teacher is None or isinstance(teacher, LiveTeacher):
        return session.corpus(), teacher
    if teacher == SELF:
        return session.corpus(), OwnWeights(student.model)
    if teacher in session.stages and session.stages[teacher].makes_signal:
        with file_lock(context.folder):  # of several processes the first writes what the cache lacks
            return open_cache(context, teacher, num_sequences)
    device, _ = resolve_teacher(session.compute)
    # one that is not beside the student is not sharded
    beside = device.type == resolve_device(session.compute)
    return session.corpus(), LiveTeacher(load_frozen(context, teacher, is_sharded=beside), device)


def _with_documents(context: StageContext, source: Teacher) -> Teacher:
    """The teacher, which is given the documents of the text's rows."""
    prompts = document_prompts(context.session.data, context.session.tokenizer())
    teacher = DocumentTeacher(source, prompts)
    line = f"the teacher reads a document before {len(prompts.by_prompt):,} prompts, {prompts.longest:,} tokens at most"
    if prompts.num_without:
        line += f"; {prompts.num_without:,} conversations have no document, and it reads them as the student does"
    context.say(line)
    return teacher


def open_on_policy(
    context: StageContext, budget: BudgetSpec, student: PreTrainedModel, teacher: Teacher | None, reference: str | None
) -> OnPolicy | None:
    """The sampler of on-policy sequences; None if the stage does not use them.

    Args:
        context: of the stage.
        budget: of the stage.
        student: what is trained.
        teacher: what it learns from.
        reference: the teacher's, in the recipe.

    Raises:
        InputError: student, teacher and the run's tokenizer do not end a text alike.
    """
    if not isinstance(budget, DistillSpec) or budget.on_policy is None:
        return None
    tokenizer, session = context.session.tokenizer(), context.session
    if stops := session.corpus().stops:
        return _of_conversations(budget.on_policy, session, stops, teacher)
    end: int = tokenizer.eos_token_id
    ours = theirs = student.generation_config.eos_token_id
    if teacher is not None and teacher.model is not None and teacher.model is not student:
        theirs = teacher.model.generation_config.eos_token_id
        written = load_tokenizer(session.artifact(str(reference)).location).eos_token_id
        if written != end and not session.is_cut:  # in a part of its tokens the teacher is cut to end as they do
            raise InputError(
                f"on_policy: the run's tokenizer ends a text with token {end}, the teacher's with {written}; "
                "set data.tokenizer: teacher, or fix eos_token in the teacher's tokenizer_config.json"
            )
    ends = agreed_ends(ours, theirs, end)
    return OnPolicy(budget.on_policy, seed=session.seed, ends=ends, vocabulary=len(tokenizer))


def _of_conversations(
    spec: OnPolicySpec, session: Session, stops: tuple[int, ...], teacher: Teacher | None
) -> OnPolicy:
    """What writes turns of the assistant; they end with what the chat template ends them with.

    Raises:
        InputError: the teacher ends none so, and would not teach the student to.
    """
    if teacher is not None and teacher.model is not None:
        theirs = ends_of(teacher.model.generation_config.eos_token_id)
        if not theirs & {*stops}:
            raise InputError(
                f"on_policy: the chat template ends a turn with token {' or '.join(map(str, stops))}, the teacher with "
                f"{' or '.join(map(str, sorted(theirs))) or '(none)'}, so its own samples would never end; take "
                "the teacher's own template (data.chat.template: teacher), or add that eos_token_id to its "
                "generation_config.json"
            )
    vocabulary, length = len(session.tokenizer()), session.data.sequence_length
    return OnPolicy(spec, seed=session.seed, ends=stops, vocabulary=vocabulary, row_of_conversations=length)


def learn_to_stop(context: StageContext, student: PreTrainedModel, stops: tuple[int, ...]) -> None:
    """Let a student that learns to end its turns be known to: engines stop at what its generation config names.

    Args:
        context: of the stage.
        student: its generation config is saved with it; changed.
        stops: ids that end a turn of the assistant; none where the text is no conversations.
    """
    config = getattr(student, "generation_config", None)
    if config is None or not (missing := [stop for stop in stops if stop not in ends_of(config.eos_token_id)]):
        return
    config.eos_token_id = sorted({*ends_of(config.eos_token_id), *stops})
    # transformers only warns about odd settings of a published config, but refuses to save a changed one
    config._original_object_hash = hash(config)
    names = ", ".join(map(repr, context.session.tokenizer().convert_ids_to_tokens(missing)))
    context.say(f"the student learns to end a turn with {names}: added to eos_token_id of its generation config")
