"""Runs lm-evaluation-harness on a model in memory, and restores what it changes.

No other file imports lm_eval. The harness sets the model to evaluation mode, draws from Python's global random state,
and may set the tokenizer's pad token. The mode and the random state are restored, and the tokenizer is copied.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from jinja2 import BaseLoader, StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from lm_eval import utils
from lm_eval.api import metrics as _  # noqa: F401  # fills the registry
from lm_eval.api.registry import metric_registry
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from distill.core.errors import InputError
from distill.evaluation.tasks.base import Answer, Answers, LanguageModel, asked_hash
from distill.evaluation.tasks.lm_eval import LmEval

# Templates in task files could run Python code in the harness's own environment; in a sandbox they cannot.
utils.env = ImmutableSandboxedEnvironment(loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True)
utils.env.filters["regex_replace"] = utils.regex_replace

RIGHT_OR_WRONG = ("acc", "exact_match", "pass@1")


def rehearse(spec: LmEval, name: str) -> None:
    """See :meth:`LmEval.rehearse`."""
    with _in_one_line(spec.task or name):
        _chosen(spec, _tasks(spec, name))


def ask(spec: LmEval, lm: LanguageModel, name: str) -> Answers:
    """See :meth:`LmEval.ask`; the tasks of a group are combined into one list of questions."""
    with _as_it_was(lm), _in_one_line(spec.task or name):
        tasks = _tasks(spec, name)
        chosen = _chosen(spec, tasks)
        tokenizer = deepcopy(lm.tokenizer)
        adapter = HFLM(
            pretrained=lm.model,
            tokenizer=tokenizer,
            max_length=lm.positions,
            batch_size=max(1, lm.batch_tokens // 512),
        )
        for kind in ("loglikelihood", "generate_until", "loglikelihood_rolling"):  # without their progress bars
            setattr(adapter, kind, partial(getattr(adapter, kind), disable_tqdm=True))
        found = evaluate(
            lm=adapter,
            task_dict={"tasks": {key: tasks[key] for key in chosen}, "groups": {}, "group_map": {}},
            samples=chosen,
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=spec.chat_template,
            fewshot_as_multiturn=spec.chat_template,
        )
        assert found is not None  # it is None only if the harness runs in several processes
        answers, chances, metrics = [], [], []
        for key in chosen:
            metric, sieve = _metric(spec, found["samples"][key])
            metrics.append(metric)
            for sample in found["samples"][key]:
                if sample["filter"] == sieve:
                    answers.append(_answer(sample, key, metric))
                    chances.append(_chance(tasks[key], sample))
        versions = {str(found["versions"].get(key)) for key in chosen}
    how = f"lm-eval {version('lm-eval')}, version {', '.join(sorted(versions))}, {', '.join(dict.fromkeys(metrics))}"
    return Answers(tuple(answers), math.fsum(chances) / len(chances), version=how)


def _tasks(spec: LmEval, name: str) -> dict[str, Any]:
    """The tasks without subtasks, by name, with the number of examples set.

    Raises:
        InputError: the task does not exist.
    """
    config = spec.config()
    for one in (config or {}).get("metric_list") or ():
        named = one.get("metric") if isinstance(one, dict) else one
        if named not in metric_registry or (isinstance(one, dict) and one.get("hf_evaluate")):
            raise InputError(f"metric {named!r} is not one of lm-eval's own; code from the Hub is not run")
    wanted: Any = config if config is not None else spec.task or name
    manager = TaskManager(include_defaults=config is None)
    if config is None and wanted not in manager.all_tasks:
        raise InputError(f"lm-eval {version('lm-eval')} has no task {wanted!r}; see lm-eval ls tasks")
    tasks: dict[str, Any] = dict(manager.load([wanted])["tasks"])
    for task in tasks.values():
        if spec.few_shot is not None:
            task.set_config(key="num_fewshot", value=spec.few_shot)
        task.set_fewshot_seed(seed=spec.seed)
    return tasks


def _chosen(spec: LmEval, tasks: dict[str, Any]) -> dict[str, list[int]]:
    """Task -> indices of the questions to ask; tasks without questions are omitted."""
    every = [(key, number) for key, task in tasks.items() for number in range(len(task.eval_docs))]
    if spec.limit is not None and spec.limit < len(every):
        every = [every[index] for index in sorted(random.Random(spec.seed).sample(range(len(every)), spec.limit))]
    chosen: dict[str, list[int]] = {}
    for key, number in every:
        chosen.setdefault(key, []).append(number)
    if not chosen:
        raise InputError("it has no questions")
    return chosen


def _metric(spec: LmEval, samples: list[dict[str, Any]]) -> tuple[str, str]:
    """(metric, filter) that determine which answers are right.

    Raises:
        InputError: the metric or filter does not exist, or the metric has values other than 0 and 1.
    """
    filters = list(dict.fromkeys(sample["filter"] for sample in samples))
    sieve = spec.filter or filters[0]
    if sieve not in filters:
        raise InputError(f"there is no filter {sieve!r} (expected one of {', '.join(filters)})")
    known = list(dict.fromkeys(name for sample in samples for name in sample.get("metrics", ())))
    metric = spec.metric or next((name for name in (*RIGHT_OR_WRONG, *known) if name in known), "acc")
    values = {sample.get(metric) for sample in samples if sample["filter"] == sieve}
    if not values <= {0, 1}:
        raise InputError(
            f"metric {metric!r} is not 0 or 1 for each question, so models cannot be compared in pairs; set metric: to "
            f"one that is (of {', '.join(known)})"
        )
    return metric, sieve


def _answer(sample: dict[str, Any], key: str, metric: str) -> Answer:
    responses = sample["filtered_resps"]
    scores: tuple[float | None, ...] = ()
    answer = str(responses[0] if responses else "")
    if responses and all(isinstance(one, list | tuple) and len(one) == 2 for one in responses):
        numbers = [float(one[0]) for one in responses]
        scores = tuple(number if math.isfinite(number) else None for number in numbers)
        best = max(range(len(numbers)), key=numbers.__getitem__)
        answer = str(best) if len(numbers) > 1 else str(bool(responses[0][1]))
    normal = sample.get("acc_norm")
    return Answer(
        id=f"{key}:{sample['doc_id']}",
        asked=asked_hash(sample["prompt_hash"], sample["target_hash"], sample["doc_hash"]),
        answer=answer,
        wanted=str(sample["target"]),
        right=bool(sample[metric]),
        normalized_answer=None if normal is None else answer,
        normalized_right=None if normal is None else bool(normal),
        scores=scores,
    )


def _chance(task: Any, sample: dict[str, Any]) -> float:
    return 1 / len(sample["arguments"]) if task.OUTPUT_TYPE == "multiple_choice" else 0.0


@contextmanager
def _as_it_was(lm: LanguageModel) -> Iterator[None]:
    state, training = random.getstate(), lm.model.training
    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        random.setstate(state)
        lm.model.train(training)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _in_one_line(task: str) -> Iterator[None]:
    """Convert errors of the harness and its data sets into one line."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{task}: {error}") from None
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # templates, data sets and the Hub raise many kinds of errors
        why = " ".join(str(error).split())[:300]
        raise InputError(f"{task}: lm-eval cannot run this task here ({type(error).__name__}: {why})") from error
