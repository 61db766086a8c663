"""Models of a run as stages load, check and save them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import PretrainedConfig, PreTrainedModel

from distill.core.artifact import Artifact
from distill.core.errors import InputError
from distill.data.cut_tokenizer import rows_of
from distill.data.task_corpus import TaskCorpus
from distill.data.tokenizer import check_read_back, check_same_vocabulary, load_tokenizer
from distill.models.configs import positions_of
from distill.models.head import pooling_if_any
from distill.models.head_names import head_of
from distill.models.layouts import layout_of
from distill.models.load import (
    empty_model,
    load_config,
    load_empty,
    load_model,
    move,
    new_config,
    new_model,
    task_of,
)
from distill.models.new import NewModel
from distill.models.packed import check_apart
from distill.models.sentence_files import write_sentence_files
from distill.models.task_models import load_for_task, new_for_task, ready_for_task
from distill.models.weight_files import prune_folder
from distill.models.written import check_written
from distill.pruning.base import Scores
from distill.pruning.layout import config_of
from distill.pruning.mask import freeze_zeros, masked_layers
from distill.pruning.plan import plan
from distill.stages.session import StageContext
from distill.training.trainer import dtype_on, resolve_device, resolve_teacher


def starting_model(context: StageContext, reference: str | NewModel, weights: str) -> Any:
    """The model that training starts from, in fp32: loaded, of the same shape with random weights, or new.

    Under fsdp it has no numbers yet in any process but the first, which sends them.

    Raises:
        InputError: it cannot be loaded or built, or is too small for the tokenizer.
    """
    session = context.session
    if isinstance(reference, NewModel):
        return _new(context, config_of_new(context, reference))
    location = session.artifact(reference).location
    check_vocabulary(context, location, tokens=weights == "pretrained")
    if weights == "random":
        config = load_config(location)
        check_read_back(session.tokenizer(), config.model_type)
        return _new(context, config)
    if not session.data.task.is_causal:
        return load_for_task(location, session.data.task, classes_of(context), dtype="float32", new_head=session.seed)
    return load_trainable(context, location)


def _new(context: StageContext, config: PretrainedConfig) -> PreTrainedModel:
    """A model with random weights and the head of the task."""
    session = context.session
    if not session.data.task.is_causal:
        return new_for_task(config, session.data.task, classes_of(context), seed=session.seed)
    return empty_model(config) if session.is_sent_models else new_model(config, seed=session.seed)


def classes_of(context: StageContext) -> tuple[str, ...]:
    """Names of the classes of the run's data, in the order of the logits; none where the task has none."""
    corpus = context.session.corpus()
    return corpus.classes if isinstance(corpus, TaskCorpus) else ()


def config_of_new(context: StageContext, model: NewModel) -> PretrainedConfig:
    """The config of a new model, with the run's tokens.

    Raises:
        InputError: it cannot be built, is too small for the tokenizer, or would have it read as another one.
    """
    tokenizer = context.session.tokenizer()
    tokens = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    known = {"vocab_size": len(tokenizer)} | {k: v for k, v in tokens.items() if v is not None}
    config = new_config(known | model.config)
    if config.get_text_config().vocab_size < len(tokenizer):
        raise InputError(
            f"config.vocab_size ({config.vocab_size}) is less than the tokenizer's {len(tokenizer)} tokens"
        )
    check_read_back(tokenizer, config.model_type)
    return config


def load_trainable(context: StageContext, location: str) -> PreTrainedModel:
    """A model in fp32; under fsdp without numbers in any process but the first, which sends them.

    Raises:
        InputError: it cannot be loaded.
    """
    empty = load_empty(location) if context.session.is_sent_models else None
    return load_model(location, dtype="float32") if empty is None else empty


def load_frozen(context: StageContext, reference: str, *, is_sharded: bool = False) -> PreTrainedModel:
    """A teacher in the precision that ``compute`` asks for, in the tokens of the stage.

    Args:
        context: of the stage.
        reference: of the teacher.
        is_sharded: whether it will be, under fsdp; then any process but the first has no numbers of it yet.

    Raises:
        InputError: it has another vocabulary than the run.
    """
    location, session = context.session.artifact(reference).location, context.session
    # a vocabulary is cut as the model is read, so every process reads that
    is_sent = is_sharded and session.is_sent_models and not session.is_cut
    if is_sent and (empty := load_empty(location)) is not None:
        return empty
    _, dtype = resolve_teacher(context.session.compute)
    return check_packing(context, load_in_vocabulary(context, location, dtype))


def load_in_vocabulary(context: StageContext, location: str, dtype: str) -> PreTrainedModel:
    """A model in the tokens of the stage; where those are a part of its own it is cut down to them as it is read.

    Its distribution over the tokens that stay is then its own, renormalised over them.

    Args:
        context: of the stage.
        location: the model's folder or Hub id.
        dtype: of the weights in memory; "auto" is that of the file.

    Raises:
        InputError: it has other tokens, or its architecture cannot be cut.
    """
    session, config = context.session, load_config(location).to_dict()
    whole = load_tokenizer(location) if session.is_cut else session.tokenizer()
    rows = rows_of(session.tokenizer(), whole) if session.is_cut else None
    if rows is None or len(rows) == len(whole):
        check_vocabulary(context, location)
        return load_for_task(
            location, session.data.task, () if session.data.task.is_causal else classes_of(context), dtype=dtype
        )
    layout = layout_of(config)
    part = plan(Scores(), {}, layout, config, vocabulary=rows)
    task = session.data.task
    if layout.task != task.head:
        fix = "train one first, by kind: finetune"
        if task.head == "embedding":
            fix = "store its body alone, by AutoModel.from_pretrained(...).save_pretrained(...), or keep all tokens"
        raise InputError(
            f"{location}: keep.vocabulary cut the student's tokens, and this model has no head for "
            f"task: {task.kind} to be compared with it; {fix}"
        )
    model = prune_folder(location, part, layout, getattr(torch, stored_dtype_of(location, dtype))).eval()
    return ready_for_task(location, model, task, () if task.is_causal else classes_of(context))


def check_vocabulary(context: StageContext, location: str, *, tokens: bool = True) -> None:
    """Refuse a model that gives the run's token ids another meaning, or has no row for some of them.

    Args:
        context: of the stage.
        location: the model's folder or Hub id.
        tokens: whether to compare its tokenizer too; a model whose weights are forgotten may learn any.

    Raises:
        InputError: it does not have the tokens of the run.
    """
    tokenizer = context.session.tokenizer()
    rows = load_config(location).get_text_config().vocab_size
    if rows < len(tokenizer):
        raise InputError(
            f"{location}: the model has {rows} embeddings for the {len(tokenizer)} tokens of the run's tokenizer; "
            "choose a model of the same vocabulary or set data.tokenizer"
        )
    if tokens:
        check_same_vocabulary(load_tokenizer(location), tokenizer)


def load_on_device(context: StageContext, location: str) -> PreTrainedModel:
    """A model to be read and measured, on the device of ``compute``.

    Raises:
        InputError: it cannot be loaded, or lets the documents of a row see each other.
    """
    device = resolve_device(context.session.compute)
    task = context.session.data.task
    if task.is_causal:
        return move(check_packing(context, load_model(location, dtype=dtype_on(device))), device)
    head = task_of(load_config(location))  # of a body alone, activations are read
    model = load_model(location, dtype=dtype_on(device), tasks=(head,))
    return move(model, device)


def check_packing(context: StageContext, model: PreTrainedModel) -> PreTrainedModel:
    """The model, if it keeps documents apart where the run's rows hold several of them.

    Raises:
        InputError: it lets them see each other.
    """
    if context.session.data.keeps_apart and not context.session.is_sent_models:
        check_apart(model)
    return model


def check_context_length(model: PreTrainedModel, length: int, what: str = "data.sequence_length") -> None:
    """Refuse sequences that are longer than the positions the model was made for.

    Raises:
        InputError: they are.
    """
    limit = positions_of(model.config.get_text_config().to_dict())
    if limit is not None and length > limit:
        raise InputError(f"{what} ({length}) is longer than the model's {limit} positions; lower it")


def hold_mask(context: StageContext, reference: str, model: PreTrainedModel, *, lora: bool) -> str | None:
    """Keep the zeros of a masked model through the training that follows; without a mask there is nothing to do.

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
    freeze_zeros(masked_layers(model, layout_of(config_of(model))))
    return lineage.mask


def save_plain(model: PreTrainedModel, stored_dtype: str, *, max_length: int | None = None) -> Any:
    """A writer of a plain Hugging Face folder for :meth:`StageContext.write_model`.

    Args:
        model: to be written.
        stored_dtype: of its weights.
        max_length: tokens of a text, at most, that a model of embeddings reads; None: 512. It never exceeds the model's
            positions.
    """

    def save(folder: Any) -> None:
        plain = move(model, "cpu").to(getattr(torch, stored_dtype))
        plain.save_pretrained(folder)
        check_written(folder, plain)
        if head_of(plain) == "embedding" and (pooling := pooling_if_any(plain)) is not None:
            length = max_length or 512
            write_sentence_files(
                Path(folder),
                width=plain.config.hidden_size,
                pooling=pooling.kind,
                normalize=pooling.normalize,
                max_length=min(length, positions_of(plain.config.to_dict()) or length),
            )

    return save


def stored_dtype_of(location: str, wanted: str) -> str:
    """The dtype in which a student is stored: as asked, or as its parent is."""
    if wanted != "auto":
        return wanted
    dtype = load_config(location).dtype
    return str(dtype).removeprefix("torch.") if dtype is not None else "float32"


def local_folder(artifact: Artifact) -> str:
    """The folder of a model, fetched from the Hub's cache when it lives there."""
    if artifact.folder is not None:
        return str(artifact.folder)
    return snapshot_download(artifact.location, allow_patterns=["*.safetensors", "*.json"])
