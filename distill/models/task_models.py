"""Load a model for a task: with the head that the task needs, a new one where training starts from a body alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from distill.core.errors import InputError
from distill.core.tasks import Embedding, ModelTask, Regression
from distill.models.head import Pooling, set_pooling
from distill.models.head_names import loader_of, task_of
from distill.models.load import (
    another_task,
    check_loaded,
    load_config,
    load_model,
    locate,
    low_bit_scheme,
    new_model,
    without_bars,
)
from distill.models.sentence_files import read_pooling
from distill.pretrained import model_from


def load_for_task(
    location: str,
    task: ModelTask,
    classes: Sequence[str] = (),
    *,
    dtype: str = "auto",
    new_head: int | None = None,
) -> PreTrainedModel:
    """Load a model in evaluation mode for a task.

    Args:
        location: folder or Hub id.
        task: of the recipe.
        classes: names of the classes of the data, in the order of the logits; empty where they are not known, or the
            task has none.
        dtype: of the weights in memory; "auto": that of the file.
        new_head: seed of the random weights of a new head, for a model that lacks the head of the task; None: such a
            model is refused.

    Raises:
        InputError: the model has another head and no new one is wanted, or other classes than the data.
    """
    if task.is_causal:
        return load_model(location, dtype=dtype)
    config = load_config(location)
    own = task_of(config)
    if own == "causal_lm":
        raise another_task(location, config.model_type, own, f"cannot be used with task: {task.kind}; use an encoder")
    if isinstance(task, Embedding):
        return _body(location, task, dtype, new_head or 0)
    if own == task.head:
        return ready_for_task(location, load_model(location, dtype=dtype, tasks=(task.head,)), task, classes)
    if new_head is None:
        raise another_task(
            location, config.model_type, own, f"has no head for task: {task.kind}; train one first, by kind: finetune"
        )
    return _with_new_head(location, task, classes, dtype, new_head)


def ready_for_task(location: str, model: PreTrainedModel, task: ModelTask, classes: Sequence[str]) -> PreTrainedModel:
    """A loaded model with the head of a task, checked, and ready to make embeddings where these are the task.

    Args:
        location: for messages.
        model: the loaded model.
        task: of the recipe.
        classes: see :func:`load_for_task`. Classes without names in the config are named by them.

    Raises:
        InputError: the model has other classes than the data, or its folder states another pooling.
    """
    _check_head(location, model.config, task, classes)
    if isinstance(task, Embedding):
        stored = read_pooling(locate(location))
        if stored not in (None, (task.pooling, task.normalize)):
            raise InputError(
                f"{location}: makes embeddings with pooling: {stored[0]} and normalize: {str(stored[1]).lower()}; set "
                "these in task"
            )
    return _pooled(model, task)


def new_for_task(config: PretrainedConfig, task: ModelTask, classes: Sequence[str], *, seed: int) -> PreTrainedModel:
    """A model of this config with random weights and the head of a task; fp32, on the CPU."""
    for key, value in _head_settings(task, classes).items():
        setattr(config, key, value)
    model = new_model(config, seed=seed, task=task.head)
    return _pooled(model, task)


def _body(location: str, task: Embedding, dtype: str, seed: int) -> PreTrainedModel:
    """A model without its head. A pooler is not read by the task, so it may be missing and is drawn from the seed."""
    if low_bit_scheme(load_config(location)):
        raise InputError(f"{location}: its weights are low-bit, which task: embedding cannot load; use the original")
    with without_bars(location), _quiet(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model, report = model_from(
            locate(location),
            loader_of("embedding"),
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    check_loaded(location, model, report, {name for name in report["missing_keys"] if name.startswith("pooler.")})
    return ready_for_task(location, model.eval(), task, ())


def _pooled(model: PreTrainedModel, task: ModelTask) -> PreTrainedModel:
    return set_pooling(model, Pooling(task.pooling, task.normalize)) if isinstance(task, Embedding) else model


def _with_new_head(location: str, task: ModelTask, classes: Sequence[str], dtype: str, seed: int) -> PreTrainedModel:
    if low_bit_scheme(load_config(location)):
        raise InputError(f"{location}: its weights are low-bit, which cannot get a new head; use the original model")
    with without_bars(location), _quiet(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed the GPU
        model, report = model_from(
            locate(location),
            loader_of(task.head),
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **_head_settings(task, classes),
        )
    body = f"{model.base_model_prefix}."
    new = {name for name in report["missing_keys"] if not name.startswith(body) or name.startswith(f"{body}pooler.")}
    check_loaded(location, model, report, new)
    return model.eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """Within the ``with`` block, transformers prints no table of the weights that are new or not used."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _head_settings(task: ModelTask, classes: Sequence[str]) -> dict[str, Any]:
    """Keys of the config that decide the shape of a head."""
    if isinstance(task, Regression):
        return {"num_labels": 1, "problem_type": "regression"}
    if not task.has_classes:
        return {}
    kinds = {"problem_type": "single_label_classification"} if task.head == "classification" else {}
    names = dict(enumerate(classes))
    return {"id2label": names, "label2id": {name: at for at, name in names.items()}, **kinds}


def _check_head(location: str, config: PretrainedConfig, task: ModelTask, classes: Sequence[str]) -> None:
    """Refuse a head that does not predict the classes, or the number, of the data.

    Raises:
        InputError: the number, the names or the order of the classes differ.
    """
    if isinstance(task, Regression) and config.num_labels != 1:
        raise InputError(f"{location}: predicts {config.num_labels} classes, and task: regression one number")
    if not classes:
        return
    names: dict[Any, str] = {**(config.id2label or {})}
    own = [str(names[at]) for at in sorted(names)]
    if len(own) != len(classes):
        raise InputError(
            f"{location}: its head has {len(own)} classes ({', '.join(own[:8])}), the data {len(classes)} "
            f"({', '.join(classes[:8])}); choose another model, or train a new head on its body"
        )
    if own != [*classes] and own == [f"LABEL_{at}" for at in range(len(own))]:
        if getattr(task, "classes", None) is None and [*classes] != [str(at) for at in range(len(classes))]:
            raise InputError(
                f"{location}: its classes have no names ({own[0]} to {own[-1]}), so their order is not known; set "
                f"task.classes to the classes of the data ({', '.join(classes[:8])}) in the order of its logits"
            )
        config.id2label = dict(enumerate(classes))
        config.label2id = {name: at for at, name in enumerate(classes)}
    elif own != [*classes]:
        if {*own} == {*classes}:
            raise InputError(
                f"{location}: its classes are in the order {', '.join(own)}, those of the data in the order "
                f"{', '.join(classes)}; set task.classes: [{', '.join(own)}]"
            )
        raise InputError(
            f"{location}: its classes are {', '.join(own[:8])}, those of the data {', '.join(classes[:8])}; name the "
            "classes in the data as the model does"
        )
