"""Tasks of lm-evaluation-harness, by name or from a YAML file. The harness itself asks the questions.

This needs the extra ``distill-lm[lm-eval]``, which is imported only if such a task is used. The scores are those of the
harness, with its prompts and its normalisation. Use it to compare with published scores. The other kinds of tasks
(``multiple_choice``, ``generate``, ``cloze``) need no extra package and no download.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from distill.core.errors import InputError, RecipeError
from distill.core.installed import install_command
from distill.core.outside import read
from distill.core.source import MOST_BYTES, parse
from distill.data.files import File
from distill.evaluation.tasks.base import Answers, LanguageModel, TaskSpec


class LmEval(TaskSpec):
    """A task of lm-evaluation-harness, by name or from a YAML file; needs the extra distill-lm[lm-eval]."""

    kind: Literal["lm_eval"] = "lm_eval"
    task: str | None = None
    """Name of a task or group of lm-evaluation-harness, or path of a YAML file of a task; unset: its name in the
    recipe."""
    metric: str | None = None
    """Metric with the values 0 and 1 that says whether an answer is right, such as exact_match; unset: acc, exact_match
    or pass@1, else the task's first metric."""
    filter: str | None = None
    """Filter, for a task with several ways to extract an answer, such as flexible-extract; unset: the first filter."""

    def missing(self) -> str | None:
        """See :meth:`TaskSpec.missing`."""
        return None if find_spec("lm_eval") is not None else f"needs lm-eval: {install_command('lm-eval')}"

    def files(self) -> list[File]:
        """The YAML file, and the local files that it reads."""
        config = self.config()
        return [] if config is None else [Path(str(self.task)), *_data_files(config)]

    def config(self) -> dict[str, Any] | None:
        """The content of the YAML file; None if the task is one of the harness's own.

        Raises:
            InputError: the file cannot be read, or needs code or other files.
        """
        if self.task is None or not self.task.endswith((".yaml", ".yml")):
            return None
        file = Path(self.task)
        try:
            source = parse(read(file, MOST_BYTES).decode("utf-8"), str(file), "a task of lm-eval")
        except UnicodeDecodeError as error:
            raise InputError(f"{file}: cannot be read as text ({error})") from None
        except RecipeError as error:
            hint = "; !function would run code, which is not allowed" if "!function" in str(error) else ""
            raise InputError(f"{error}{hint}") from None
        if source.mistakes:
            raise InputError(source.mistakes[0])
        found = source.data
        if not isinstance(found.get("task"), str):
            raise InputError(f"{file}: must be one task of lm-eval, with its name as task:")
        if "include" in found:
            raise InputError(f"{file}: include is not supported; write the whole task into one file")
        kwargs = found.get("dataset_kwargs")
        if kwargs is not None and not isinstance(kwargs, dict):
            raise InputError(f"{file}: dataset_kwargs is a mapping of keys to values (got {type(kwargs).__name__})")
        if (kwargs or {}).get("trust_remote_code"):
            raise InputError(f"{file}: trust_remote_code would run code of a data set, which is not allowed; remove it")
        return found

    def rehearse(self, name: str) -> None:
        """Let the harness load the task and its questions."""
        if self.missing() is None:
            import_module("distill.evaluation.tasks.harness").rehearse(self, name)

    def ask(self, lm: LanguageModel, name: str) -> Answers:
        """Let the harness ask the model.

        Raises:
            InputError: lm-eval is not installed or does not know the task, or its data is not available.
        """
        if (missing := self.missing()) is not None:
            raise InputError(missing)
        answers: Answers = import_module("distill.evaluation.tasks.harness").ask(self, lm, name)
        return answers


def _data_files(config: dict[str, Any]) -> list[File]:
    """The local files of a task's data set."""
    named = (config.get("dataset_kwargs") or {}).get("data_files") or {}
    lists = named.values() if isinstance(named, dict) else [named]
    paths = [path for one in lists for path in (one if isinstance(one, list) else [one])]
    return [Path(path) for path in paths if isinstance(path, str) and Path(path).is_file()]
