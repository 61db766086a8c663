"""What is known of the models of a run before it starts: configs on this machine, and what stages make of them.

A model that is not on this machine is unknown; nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distill.core.artifact import read_json
from distill.core.errors import InputError
from distill.models.layouts import LAYOUTS, layout_for
from distill.models.load import locate
from distill.pruning.search import Candidate
from distill.pruning.select import target_sizes
from distill.stages.base import StageSpec
from distill.stages.distill import Distill
from distill.stages.finetune import Finetune, NewModel
from distill.stages.prune import Prune
from distill.stages.quantize import Quantize
from distill.stages.sparsify import Sparsify

Config = dict[str, Any]
Known = dict[str, Config | None]
"""Reference -> config, or None where it is not known."""

SOURCES: dict[type[StageSpec], str] = {
    Prune: "model",
    Sparsify: "model",
    Finetune: "model",
    Distill: "student",
    Quantize: "student",
}
"""Stage that makes a model of another -> key of that other."""


def config_of(reference: str) -> Config | None:
    """A model's config, if it is on this machine."""
    location = locate(reference)
    file: Path | None = Path(location) / "config.json"
    if file is None or not file.is_file():
        if Path(location).is_dir():
            raise InputError(f"{location}: not a model folder (no config.json in it)")
        from huggingface_hub import try_to_load_from_cache

        try:
            cached = try_to_load_from_cache(location, "config.json")
        except ValueError as error:
            raise InputError(f"{location}: neither a folder nor a Hub id ({' '.join(str(error).split())})") from None
        file = Path(cached) if isinstance(cached, str) else None
    if file is None:
        return None
    config = read_json(file)
    generation = file.with_name("generation_config.json")
    if generation.is_file():  # it has the last word on what ends a text
        config["eos_token_id"] = read_json(generation).get("eos_token_id", config.get("eos_token_id"))
    return config


def known_or_found(reference: str, known: Known) -> Config | None:
    """The config of a stage's model, or of one on this machine."""
    return known[reference] if reference in known else config_of(reference)


def configs_after(stage: StageSpec, before: Mapping[str, list[Config]], sequence_length: int) -> list[Config]:
    """Every config that the model of a stage may have; none where nothing is known of it.

    Args:
        stage: that makes it.
        before: reference -> the same of the teacher and of the stages before.
        sequence_length: of the recipe, for a budget of FLOPs.

    Raises:
        InputError: none of what the stage may read can be cut so.
    """
    if isinstance(stage, Finetune) and isinstance(stage.model, NewModel):
        return [dict(stage.model.config)]
    reference = source_of(stage)
    if reference is None:
        return []
    configs = before[reference] if reference in before else [c for c in [config_of(reference)] if c is not None]
    if not isinstance(stage, Prune) or not configs:
        return configs
    if stage.search is not None:
        return _searched(stage, largest(configs) or {}, sequence_length)
    after, refused = [], []
    for config in configs:
        try:
            after.append(_cut(stage, config))
        except InputError as error:
            refused.append(error)
    if not after:
        raise refused[0]
    return after


def source_of(stage: StageSpec) -> str | None:
    """The reference of the model that a stage makes its own of; None where it makes none, or a new one."""
    reference = getattr(stage, SOURCES[type(stage)]) if type(stage) in SOURCES else None
    return reference if isinstance(reference, str) else None


def largest(configs: Sequence[Config]) -> Config | None:
    """The one of most parameters; None of none."""
    return max(configs, key=lambda one: count(one) or 0, default=None)


def _cut(stage: Prune, config: Config) -> Config:
    assert stage.keep is not None
    layout = layout_for(str(config.get("model_type")))
    stage.check_criteria(layout)
    after = target_sizes(stage.keep, config, layout)
    if isinstance(stage.keep.vocabulary, int):
        after["vocabulary"] = stage.keep.vocabulary
    return config | layout.resized(config, after)


def _searched(stage: Prune, config: Config, sequence_length: int) -> list[Config]:
    assert stage.search is not None
    layout = layout_for(str(config.get("model_type")))
    stage.check_criteria(layout)
    if stage.search.budget.is_time:
        return [config]  # how large a model of some speed is shows when it is measured
    return [config | layout.resized(config, c.sizes) for c in candidates(stage, config, sequence_length)]


def count(config: Config | None) -> int | None:
    """Parameters of a model; None where its architecture has no layout, or its config is not known."""
    layout = LAYOUTS.get(str(config.get("model_type"))) if config else None
    if layout is None or config is None or "vocab_size" not in config:
        return None
    return layout.count(config)


def size(config: Config | None) -> str:
    """The same in words."""
    number = count(config)
    if number is None:
        return "a model of unknown size (its config is not on this machine)"
    return f"{number / 1e9:.2f}B parameters" if number >= 1e9 else f"{number / 1e6:.2f}M parameters"


def candidates(stage: Prune, config: Config, sequence_length: int) -> list[Candidate]:
    """The architectures that a search has to choose from."""
    assert stage.search is not None
    layout = layout_for(str(config.get("model_type")))
    costs = stage.search.costs(layout, config, sequence_length=sequence_length, dtype=stored_dtype(stage, config))
    return stage.search.candidates(stage.search.space(layout, config), costs)


def stored_dtype(stage: Prune, config: Config) -> str:
    """Precision in which a cut model is stored."""
    return str(config.get("dtype") or config.get("torch_dtype")) if stage.save_dtype == "auto" else stage.save_dtype
