"""The training that finetune, distill and quantize share: they differ by data, not by copied loops."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from distill.core.artifact import fingerprint
from distill.core.errors import InputError
from distill.losses.base import AnyLossSpec
from distill.stages.base import SELF, Released, StageContext
from distill.training.spec import BudgetSpec, split_batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from distill.training.assemble import Student
    from distill.training.live_teacher import LiveTeacher
    from distill.training.on_policy import OnPolicy
    from distill.training.teacher import Teacher


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
) -> dict[str, Any]:
    """Train an assembled student in place, from the stage's last checkpoint if there is one.

    All processes of the run do it together; of several only the first comes back from it.

    Args:
        context: of the stage.
        student: what to train.
        losses: at least one.
        budget: how long; a budget of 0 does nothing.
        teacher: reference of the frozen teacher or of its cache, "self", one that is loaded, or None.
        start: reference of the model that the student starts from, or None without a teacher.
        quantized_from_step: steps that a fake-quantized student makes in full precision first.
        freeze_scales: share of the steps after which the scales of its weights stand still; None: they never do.

    Returns:
        Figures: steps, tokens, seconds of training, tokens a second.

    Raises:
        Released: in all processes but the first.
    """
    from distill.data.packing import alone
    from distill.stages.cache_teacher import open_cache
    from distill.stages.origin import origin_of
    from distill.training.live_teacher import LiveTeacher
    from distill.training.module import DistillationModule
    from distill.training.own_weights import OwnWeights
    from distill.training.ranks import together
    from distill.training.trainer import fit, resolve_device, resolve_teacher

    session, world = context.session, context.session.world
    corpus = session.corpus()
    tokens_per_sequence = corpus.tokens_per_sequence
    num_steps = budget.steps(tokens_per_sequence)
    if num_steps == 0:
        return {"training_steps": 0, "training_tokens": 0, "training_seconds": 0.0}
    held_from_step = None if freeze_scales is None else int(freeze_scales * num_steps)
    check_context_length(student.model, session.data.sequence_length)
    check_packing(context, student.model)
    made_of = {"recipe, text and models": context.input_hash}
    if isinstance(teacher, str) and teacher != SELF:
        made_of["teacher"] = fingerprint(session.artifact(teacher).location)
    source: Teacher | None = None
    if isinstance(teacher, LiveTeacher):
        source, teacher = teacher, None
    elif teacher == SELF:
        source = OwnWeights(student.model)
    elif teacher in session.stages and session.stages[teacher].makes_signal:
        with alone(context.folder):  # of several processes the first writes what the cache lacks
            corpus, source = open_cache(context, teacher, num_steps * budget.batch_size)
    elif teacher is not None:
        device, _ = resolve_teacher(session.compute)
        # one that is not beside the student is not shared out
        beside = device.type == resolve_device(session.compute)
        source = LiveTeacher(load_frozen(context, teacher, is_shared_out=beside), device)
    module = DistillationModule(
        student.model,
        losses,
        source,
        on_policy=open_on_policy(context, budget, student.model, source, teacher),
        optimizer=budget.optimizer,
        num_steps=num_steps,
        origin=origin_of(session, start, teacher) if start is not None and teacher is not None else None,
        quantized_from_step=quantized_from_step,
        held_from_step=held_from_step,
    )
    for line in module.states.summary() if module.states is not None else ():
        context.say(line)
    started = time.perf_counter()
    with together(world, resolve_device(session.compute), context.name):
        fit(
            module,
            budget,
            session.compute,
            name=context.name,
            folder=context.folder,
            tokens_per_sequence=tokens_per_sequence,
            train_loader=lambda micro, consumed: corpus.train_loader(
                micro, consumed, world.rank, world.size, session.compute.num_workers
            ),
            validation_loader=corpus.validation_loader(split_batch(budget, session.compute, world.size)[0]),
            logger=session.logger(),
            say=session.say,
            world=world,
            made_of=made_of,
        )
    if world.rank:
        raise Released
    seconds = time.perf_counter() - started
    planned = round(num_steps * budget.batch_size * tokens_per_sequence)
    tokens = planned if module.on_policy is None else int(module.tokens_read)
    return {"training_steps": num_steps, "training_tokens": tokens, "training_seconds": round(seconds, 1)}


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


def open_on_policy(
    context: StageContext, budget: BudgetSpec, student: PreTrainedModel, teacher: Teacher | None, reference: str | None
) -> OnPolicy | None:
    """What writes the student's own sequences, when the stage asks for them.

    Args:
        context: of the stage.
        budget: of the stage.
        student: what is trained.
        teacher: what it learns from.
        reference: the teacher's, in the recipe.

    Raises:
        InputError: student, teacher and the run's tokenizer do not end a text alike.
    """
    from distill.data.tokenizer import load_tokenizer
    from distill.training.ends import agreed_ends
    from distill.training.on_policy import OnPolicy
    from distill.training.spec import DistillSpec

    if not isinstance(budget, DistillSpec) or budget.on_policy is None:
        return None
    tokenizer, session = context.session.tokenizer(), context.session
    end: int = tokenizer.eos_token_id
    ours = theirs = student.generation_config.eos_token_id
    if teacher is not None and teacher.model is not None and teacher.model is not student:
        theirs = teacher.model.generation_config.eos_token_id
        written = load_tokenizer(session.artifact(str(reference)).location).eos_token_id
        if written != end and not session.is_cut:  # in a part of its tokens the teacher is cut to end as they do
            raise InputError(
                f"on_policy: the run's tokenizer ends a text with token {end}, the teacher's with {written}; "
                "set data.tokenizer: teacher, or mend eos_token in the teacher's tokenizer_config.json"
            )
    ends = agreed_ends(ours, theirs, end)
    return OnPolicy(budget.on_policy, seed=session.seed, ends=ends, vocabulary=len(tokenizer))


def load_trainable(context: StageContext, location: str) -> PreTrainedModel:
    """A model in fp32; without numbers in a process that is sent its shares of it later.

    Raises:
        InputError: it cannot be loaded.
    """
    from distill.models.load import load_empty, load_model

    empty = load_empty(location) if context.session.is_sent_models else None
    return load_model(location, dtype="float32") if empty is None else empty


def load_frozen(context: StageContext, reference: str, *, is_shared_out: bool = False) -> PreTrainedModel:
    """A teacher in the precision that ``compute`` asks for, in the tokens of the stage.

    Args:
        context: of the stage.
        reference: of the teacher.
        is_shared_out: whether it will be, under fsdp; then it has no numbers yet in a process that is sent its shares.

    Raises:
        InputError: it speaks another vocabulary than the run.
    """
    from distill.models.load import load_empty
    from distill.stages.tokens import load_speaking
    from distill.training.trainer import resolve_teacher

    location, session = context.session.artifact(reference).location, context.session
    # a cut vocabulary is carved as it is read, so every process reads that
    is_sent = is_shared_out and session.is_sent_models and not session.is_cut
    if is_sent and (empty := load_empty(location)) is not None:
        return empty
    _, dtype = resolve_teacher(context.session.compute)
    return check_packing(context, load_speaking(context, location, dtype))


def check_speaks(context: StageContext, location: str, *, tokens: bool = True) -> None:
    """Refuse a model that gives the run's token ids another meaning, or has no row for some of them.

    Args:
        context: of the stage.
        location: the model's folder or Hub id.
        tokens: whether to compare its tokenizer too; a model whose weights are forgotten may learn any.

    Raises:
        InputError: it does not speak the tokens of the run.
    """
    from distill.data.tokenizer import check_same_vocabulary, load_tokenizer
    from distill.models.load import load_config

    tokenizer = context.session.tokenizer()
    rows = load_config(location).get_text_config().vocab_size
    if rows < len(tokenizer):
        raise InputError(
            f"{location}: the model has {rows} embeddings for the {len(tokenizer)} tokens of the run's tokenizer; "
            "choose a model of the same vocabulary or set data.tokenizer"
        )
    if tokens:
        check_same_vocabulary(load_tokenizer(location), tokenizer)


def check_packing(context: StageContext, model: PreTrainedModel) -> PreTrainedModel:
    """The model, if it keeps documents apart where the run's rows hold several of them; who reads it finds out.

    Raises:
        InputError: it lets them see each other.
    """
    from distill.models.packed import check_apart

    if context.session.data.keeps_apart and not context.session.is_sent_models:
        check_apart(model)
    return model


def check_context_length(model: PreTrainedModel, length: int, what: str = "data.sequence_length") -> None:
    """Refuse sequences that are longer than the positions the model was made for.

    Raises:
        InputError: they are.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise InputError(f"{what} ({length}) is longer than the model's {limit} positions; lower it")


def hold_mask(context: StageContext, reference: str, model: PreTrainedModel, *, lora: bool) -> str | None:
    """Hold the zeros of a masked model through the training to come; nothing to do where there is no mask.

    Args:
        context: of the stage.
        reference: of the model that training starts from.
        model: that model, before anything is wrapped.
        lora: whether adapters are to be trained.

    Returns:
        The mask in words, for the lineage of what is made, or None.

    Raises:
        InputError: adapters would fill the zeros when they are merged.
    """
    lineage = context.session.artifact(reference).lineage()
    if lineage is None or lineage.mask is None:
        return None
    if context.session.compute.strategy == "fsdp" and context.session.world.size > 1:
        raise InputError(f"{reference}: its weights are masked, which compute.strategy: fsdp cannot hold; use ddp")
    if lora:
        raise InputError(
            f"{reference}: its weights are masked ({lineage.mask}), and a merged adapter would fill the zeros; "
            "train the weights (no lora), or mask after this stage"
        )
    from distill.models.layouts import layout_for
    from distill.pruning.mask import hold_zeros, masked_layers

    hold_zeros(masked_layers(model, layout_for(model.config.model_type)))
    return lineage.mask


def save_plain(model: PreTrainedModel, stored_dtype: str) -> Any:
    """A writer of a plain Hugging Face folder for :meth:`StageContext.write_model`, in ``stored_dtype``."""
    import torch

    from distill.models.load import move

    def save(folder: Any) -> None:
        move(model, "cpu").to(getattr(torch, stored_dtype)).save_pretrained(folder)

    return save


def stored_dtype_of(location: str, wanted: str) -> str:
    """The dtype in which a student is stored: as asked, or as its parent is."""
    if wanted != "auto":
        return wanted
    from distill.models.load import load_config

    dtype = load_config(location).dtype
    return str(dtype).removeprefix("torch.") if dtype is not None else "float32"
