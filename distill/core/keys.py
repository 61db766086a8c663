"""Which keys are legal where in a recipe, and where a key that was written in the wrong place belongs."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from distill.core.source import KeyPath
from distill.core.spec import Family, Spec

OTHER_WORDS = {
    "learning_rate": "lr",
    "epochs": "num_tokens",
    "num_epochs": "num_tokens",
    "num_train_epochs": "num_tokens",
    "max_steps": "num_steps",
    "steps": "num_steps",
    "train_batch_size": "batch_size",
    "per_device_train_batch_size": "micro_batch_size",
    "gradient_accumulation_steps": "micro_batch_size",
    "max_length": "sequence_length",
    "max_seq_length": "sequence_length",
    "seq_len": "sequence_length",
    "block_size": "sequence_length",
    "num_layers": "num_hidden_layers",
    "n_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "gpus": "devices",
    "num_gpus": "devices",
    "bf16": "precision",
    "fp16": "precision",
    "save_steps": "checkpoint_every_steps",
    "logging_steps": "log_every_steps",
    "eval_steps": "validate_every_steps",
    "max_grad_norm": "clip_norm",
    "rank": "r",
    "lora_r": "r",
    "lora_alpha": "alpha",
}
"""Keys of other tools and of model configs -> the key here."""
OTHER_UNITS = {"epochs", "num_epochs", "num_train_epochs", "gradient_accumulation_steps", "bf16", "fp16"}
"""Those of them whose values mean something else."""
MOST_LEVELS = 3


@dataclass(frozen=True)
class Belongs:
    """Where a key belongs.

    Attributes:
        path: keys from the place where it was looked for down to it, itself at the end.
        kind: of the family's member that has it, where it must be named for the key to be legal.
        in_list: whether the family's members stand in a list.
    """

    path: tuple[str, ...]
    kind: str | None = None
    in_list: bool = False

    def written(self, key: str, value: Any) -> str:
        """How to write it, as YAML in one line: ``optimizer: {lr: 0.001}``.

        Args:
            key: as it was written.
            value: likewise; shown where it means the same under our key.
        """
        *parents, own = self.path
        shown = "..." if isinstance(value, dict | list) or key in OTHER_UNITS else _yaml(value)
        text = f"{own}: {shown}" if self.kind is None else f"kind: {self.kind}, {own}: {shown}"
        for parent in reversed(parents):
            text = f"{parent}: [{{{text}}}]" if self.in_list and parent == parents[-1] else f"{parent}: {{{text}}}"
        return text


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


def fields_at(root: type[Spec], data: Any, path: KeyPath) -> list[str]:
    """Keys that are legal at a path of a recipe, following kinds as they were written.

    Args:
        root: the recipe's Spec.
        data: the recipe as plain data.
        path: where.
    """
    spec = spec_at(root, data, path)
    return list(spec.model_fields) if spec is not None else []


def spec_at(root: type[Spec], data: Any, path: KeyPath) -> type[Spec] | None:
    """The Spec that the value at a path is checked against; None where it is none."""
    spec: Any = root
    for part in path:
        annotation: Any = spec
        if is_spec(spec) and isinstance(part, str):  # a list of Specs has been narrowed to its items' already
            if part not in spec.model_fields:
                return None
            annotation = _annotation(spec, str(part))
        data = _item(data, part)
        spec = _narrow(annotation, data, part)
    return spec if is_spec(spec) else None


def places_of(key: str, spec: type[Spec]) -> list[Belongs]:
    """Where below a Spec a key stands, the nearest first; a key of the Spec itself is not looked for.

    Args:
        key: as it was written; words of other tools are understood.
        spec: of the mapping in which it was written.
    """
    wanted = {key, OTHER_WORDS.get(key, key)}
    found: list[Belongs] = []
    level: list[tuple[tuple[str, ...], type[Spec]]] = [((), spec)]
    for depth in range(MOST_LEVELS):
        below: list[tuple[tuple[str, ...], type[Spec]]] = []
        for path, parent in level:
            for name in parent.model_fields:
                if name in wanted and (path or name != key):
                    found.append(Belongs((*path, name)))
                annotation = _annotation(parent, name)
                for kind, inner in _inner(annotation):
                    if kind is None:
                        below.append(((*path, name), inner))
                    elif depth == 0 and (hits := wanted & {*inner.model_fields}):
                        found.append(Belongs((*path, name, min(hits)), kind, _is_list(annotation)))
        level = below
    return found


def is_spec(value: Any) -> bool:
    """Whether it is a Spec class."""
    return isinstance(value, type) and issubclass(value, Spec)


def _inner(annotation: Any) -> Iterator[tuple[str | None, type[Spec]]]:
    """Specs that a value of this annotation can be checked against; those of a family with their kind.

    Mappings of Specs are left out: a key of theirs cannot be written without knowing which item is meant.
    """
    if isinstance(annotation, Family):
        yield from annotation.items()
    elif is_spec(annotation):
        yield None, annotation
    elif typing.get_origin(annotation) is Annotated:
        inner, *more = typing.get_args(annotation)
        families = [item for item in more if isinstance(item, Family)]
        yield from _inner(families[0] if families else inner)
    elif typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for option in typing.get_args(annotation):
            yield from _inner(option)
    elif _is_list(annotation):
        yield from ((kind, inner) for kind, inner in _inner(typing.get_args(annotation)[0]) if kind is not None)


def _is_list(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (list, tuple)


def _annotation(spec: type[Spec], field: str) -> Any:
    found = spec.model_fields[field]
    families = [item for item in found.metadata if isinstance(item, Family)]
    return families[0] if families else found.annotation


def _item(data: Any, part: str | int) -> Any:
    if isinstance(data, dict):
        return data.get(part)
    return data[part] if isinstance(data, list) and isinstance(part, int) and part < len(data) else None


def _narrow(annotation: Any, data: Any, part: str | int) -> Any:
    """From an annotation to the Spec that the value at hand is checked against, or to the annotation of its items."""
    if isinstance(annotation, Family):
        kind = data.get("kind", part) if isinstance(data, dict) else None
        return annotation[kind] if kind in list(annotation) else None
    if is_spec(annotation):
        return annotation
    if typing.get_origin(annotation) is Annotated:
        families = [item for item in typing.get_args(annotation)[1:] if isinstance(item, Family)]
        return _narrow(families[0] if families else typing.get_args(annotation)[0], data, part)
    if typing.get_origin(annotation) in (dict, list, tuple):
        *_, last = (item for item in typing.get_args(annotation) if item is not ...)  # of tuple[int, ...] too
        return last
    options = [_narrow(option, data, part) for option in typing.get_args(annotation) if option is not type(None)]
    return next((option for option in options if option is not None and not isinstance(option, str)), None)


def listed(words: Iterable[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last
