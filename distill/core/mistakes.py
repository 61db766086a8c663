"""Mistakes of a recipe in the project's own words: one line each, with its place, and how to fix it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

from pydantic import ValidationError

from distill.core.keys import OTHER_WORDS, Belongs, fields_at, listed, places_of, spec_at
from distill.core.source import SET, KeyPath, Source, suggest
from distill.core.spec import DEVICE, HUB_REPOSITORY, NAME, VARIABLE, Family, Spec

NO_SUCH = "no_such_"
"""Begins the type of the error when a family has no such member."""
LONGEST_GOT = 200
"""Characters of a wrong value that are shown."""
MOST_ASKED = 20
"""Overrides that are left out one by one, to find the one that a mistake comes from; of more, all are named."""
IN_WORDS = {
    NAME: "a name holds letters, digits, . _ and - only, at most 100 of them, and begins with a letter or a digit",
    HUB_REPOSITORY: "expected a repository of the Hub as ORG/NAME, such as my-org/my-model",
    VARIABLE: "expected the name of an environment variable, such as OPENAI_API_KEY",
    DEVICE: "expected auto, cpu, cuda or one GPU, such as cuda:1",
}
"""What the patterns ask for."""
FORMS = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "greater_than": "greater than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "literal_error": "{expected}",
}
"""Type of pydantic's error -> what the value must be."""
MODEL_NAME = (
    "must name a model: an earlier stage, teacher, a folder or a Hub id. An earlier stage can make a new model from a "
    "config, such as small: {kind: finetune, model: {config: ...}, num_tokens: 0}"
)
MAPPING = ("model_type", "dict_type")
"""Types of pydantic's errors where keys and values were expected."""
OTHER_KINDS = {
    "int4": "int_group",
    "int3": "int_group",
    "int2": "int_group",
    "int8": "int8_channel",
    "kl": "forward_kl",
    "kl_div": "forward_kl",
    "kd": "forward_kl",
    "jsd": "jensen_shannon",
    "ce": "cross_entropy",
    "mse": "hidden_mse",
    "sft": "finetune",
    "train": "finetune",
    "json": "jsonl",
    "text": "text_files",
    "huggingface": "hub",
}
"""What others call a member of a family -> its kind."""


def mistakes_of(error: ValidationError, source: Source, root: type[Spec], families: list[Family]) -> list[str]:
    """Pydantic's errors as the project's lines ``file:line: key: what (got ..., expected ...)``.

    Args:
        error: what validation raised.
        source: the recipe, for places and for what was written.
        root: the Spec that was validated.
        families: every family that it uses.
    """
    nouns = {family.noun: family for family in families}
    said: dict[KeyPath, list[str]] = {}  # a value that fits no form of a union has a mistake for each form
    got: dict[KeyPath, str] = {}
    for item in error.errors():
        path = _written(item["loc"], source.data, missing=item["type"] == "missing")
        said.setdefault(path, []).append(_what(item, path, source, root, nouns))
        got[path] = _got(item)
    outer = {path[:length] for path in said for length in range(len(path))}
    return [
        f"{source.at(path)}: {_either(whats)}{got[path]}"
        for path, whats in said.items()
        if path not in outer  # else one further in is of the form that was meant
    ]


def _what(item: Any, path: KeyPath, source: Source, root: type[Spec], nouns: dict[str, Family]) -> str:
    """What is wrong with one value."""
    kind = item["type"]
    if kind == "extra_forbidden":
        return _unknown_key(path, item["input"], source.data, root)
    if kind == "missing":
        return "is missing"
    if kind in MAPPING:
        return "needs a mapping of keys to values" + _such_as(path, spec_at(root, source.data, path))
    if kind.startswith(NO_SUCH):
        return _no_such(nouns[kind.removeprefix(NO_SUCH)], path, _at(source.data, path))
    if kind == "string_pattern_mismatch":
        return IN_WORDS[item["ctx"]["pattern"]]
    if kind == "string_type" and path[-1] in ("student", "teacher", "model"):
        return MODEL_NAME
    if kind in FORMS:
        limits = {name: f"{x:g}" if isinstance(x, float) else x for name, x in item.get("ctx", {}).items()}
        return "must be " + FORMS[kind].format(**limits) + _list_such_as(kind, path, source.data, root)
    if kind in ("too_short", "string_too_short"):
        return "must not be empty"
    what = str(item["msg"]).removeprefix("Value error, ")
    return what[0].lower() + what[1:]


def _unknown_key(path: KeyPath, value: Any, data: Any, root: type[Spec]) -> str:
    """Where a key that is not legal here belongs; else the nearest one that is; else all."""
    key, spec = str(path[-1]), spec_at(root, data, path[:-1])
    legal = fields_at(root, data, path[:-1])
    if OTHER_WORDS.get(key) in legal:
        return f"unknown key; it is called {OTHER_WORDS[key]} here"
    below = places_of(key, spec) if spec is not None else []
    if below:
        return f"unknown key here; write {below[0].written(key, value)}"
    if near := suggest(key, legal):
        return "unknown key" + near
    if path[0] != "stages" and (stages := _stages_with(key, root)):
        place = stages[next(iter(stages))]
        return f"unknown key here; write {place.written(key, value)} in a stage ({listed(stages)})"
    if above := [place for place in places_of(key, root) if place.kind is None and len(path) > 1]:
        return f"unknown key here; write {above[0].written(key, value)} at the top of the recipe"
    return f"unknown key (expected one of {', '.join(legal)})"


def _stages_with(key: str, root: type[Spec]) -> dict[str, Belongs]:
    """Kinds of stages that take a key, and where in them."""
    own = OTHER_WORDS.get(key, key)
    direct = {kind: Belongs((own,)) for kind, stage in _stages(root) if own in stage.model_fields}
    return direct or {
        kind: places[0] for kind, stage in _stages(root) if (places := [p for p in places_of(key, stage) if not p.kind])
    }


def _stages(root: type[Spec]) -> list[tuple[str, type[Spec]]]:
    """The kinds of stages, where the root has any."""
    field = root.model_fields.get("stages")
    families = [part for arg in get_args(field.annotation) for part in get_args(arg)] if field else []
    return next((part.items() for part in families if isinstance(part, Family)), [])


def _no_such(family: Family, path: KeyPath, value: Any) -> str:
    """A family has no member of the kind that was written, or none was."""
    kinds, noun = list(family), family.noun
    if noun == "stage" and not isinstance(value, dict):
        return f"a stage needs a mapping of keys to values, such as {path[-1]}: {{model: {value}}}"
    kind = value.get("kind") if isinstance(value, dict) else value
    if isinstance(value, list):
        return f"must be one {noun}, not a list; such as {path[-1]}: {{kind: {kinds[0]}}}"
    if noun == "stage" and "kind" not in value:
        near = suggest(path[-1], kinds)
        meant = next((one for one in kinds if repr(one) in near), kinds[0])
        return (
            f"no stage called {path[-1]!r}{near or '.'} A stage with a name of its own says its kind, such as "
            f"{path[-1]}: {{kind: {meant}, ...}} (kinds: {', '.join(kinds)})"
        )
    if kind is None:
        return f"needs a kind (one of {', '.join(kinds)})"
    if (ours := OTHER_KINDS.get(str(kind).lower())) in kinds:
        return f"no {noun} called {kind!r}; it is called {ours} here (one of {', '.join(kinds)})"
    return f"no {noun} called {_shortened(repr(kind))} (one of {', '.join(kinds)})" + suggest(kind, kinds)


def _such_as(path: KeyPath, spec: type[Spec] | None) -> str:
    """An example of the mapping that was wanted: its required keys, or none."""
    if spec is None or not path:
        return ""
    needed = ", ".join(f"{name}: ..." for name, field in spec.model_fields.items() if field.is_required())
    first = next((f"{name}: ..." for name in spec.model_fields if name != "kind"), "")
    if needed:
        return f", such as {path[-1]}: {{{needed}}}"
    return f", such as {path[-1]}: {{}} for its defaults, or {path[-1]}: {{{first}}}"


def _list_such_as(kind: str, path: KeyPath, data: Any, root: type[Spec]) -> str:
    """An example of the list that was wanted."""
    if kind not in ("list_type", "tuple_type"):
        return ""
    spec, value = spec_at(root, data, (*path, 0)), _at(data, path)
    if spec is not None:
        needed = [name for name, field in spec.model_fields.items() if field.is_required()] or list(spec.model_fields)
        return f", such as {path[-1]}: [{{{', '.join(f'{name}: ...' for name in needed)}}}]"
    return "" if isinstance(value, dict) else f", such as {path[-1]}: [{value}]"


def _got(item: Any) -> str:
    """What was written instead, where that is short and not said already."""
    kind, got = item["type"], item["input"]
    if kind in {"extra_forbidden", "missing", "value_error", "too_short"} or kind.startswith(NO_SUCH):
        return ""
    if isinstance(got, dict | list):
        return f" (got a {'list' if isinstance(got, list) else 'mapping of keys to values'})"
    shown = str(got).lower() if isinstance(got, bool) else _shortened(repr(got))
    near = (
        suggest(got, [part.strip("'") for part in item["ctx"]["expected"].replace(" or ", ", ").split(", ")])
        if (kind == "literal_error")
        else ""
    )
    return f" (got {shown})" + near


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST_GOT else f"{text[:LONGEST_GOT]}..."


def _either(whats: list[str]) -> str:
    """``must be 'auto'`` and ``must be a whole number`` in one."""
    first, *others = dict.fromkeys(whats)
    return " or ".join([first, *(what.removeprefix("must be ") for what in others)])


def _at(data: Any, path: KeyPath) -> Any:
    """The value at a path of plain data."""
    for part in path:
        data = data[part]
    return data


def _has(data: Any, part: str | int) -> bool:
    if isinstance(data, list):
        return isinstance(part, int) and part < len(data)
    return isinstance(data, dict) and part in data


def _written(loc: tuple[str | int, ...], data: Any, *, missing: bool) -> KeyPath:
    """Drop from a pydantic location the tags that stand for a union's choice, not for a key of the file."""
    path: list[str | int] = []
    for i, part in enumerate(loc):
        if _has(data, part):
            data = data[part]
        elif not (missing and i == len(loc) - 1):
            continue
        path.append(part)
    return tuple(path)


def blamed(mistakes: list[str], overrides: list[str], mistakes_with: Callable[[list[str]], list[str]]) -> list[str]:
    """The mistakes; one that stands at a line of the file, but only by an override, says by which.

    Args:
        mistakes: with all overrides.
        overrides: ``key=value`` each.
        mistakes_with: the mistakes with some of them.
    """
    if not overrides or all(line.startswith(SET) for line in mistakes):
        return mistakes
    of_file = set(mistakes_with([]))
    if all(line.startswith(SET) or line in of_file for line in mistakes):
        return mistakes
    asked = overrides if len(overrides) <= MOST_ASKED else []
    without = {one: {*mistakes_with([o for j, o in enumerate(overrides) if j != i])} for i, one in enumerate(asked)}

    def by_whom(line: str) -> str:
        if line.startswith(SET) or line in of_file:
            return ""
        guilty = [one for one, others in without.items() if line not in others] or overrides
        return ", ".join(f"{SET} {one.partition('=')[0]}" for one in guilty) + ": "

    return [by_whom(line) + line for line in mistakes]
