"""The model card: lineage, licence, measurements, verification and how to load the model; unknown facts are omitted."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from distill.core.artifact import Lineage
from distill.core.markdown import escaped, without_tags
from distill.exporters.base import CardFacts, VerifyResult

TAGS = {"prune": "pruned", "sparsify": "sparse", "quantize": "quantized"}
"""Kind of a stage -> the tag that a model gets by it."""
METRICS = {"Perplexity": "perplexity", "Accuracy": "accuracy"}
"""Beginning of a column of the table -> the Hub's name of the metric."""
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def write_card(
    folder: Path,
    *,
    title: str,
    facts: CardFacts,
    engine: str,
    lineage: Lineage | None,
    notes: Sequence[str] = (),
    rows: Sequence[Mapping[str, Any]] = (),
    verified: VerifyResult | str = "it has not been compared with the trained model",
    base_model: str | None = None,
    kinds: Sequence[str] = (),
    datasets: Sequence[str] = (),
) -> None:
    """Write ``README.md`` into an exported folder; an existing one is replaced.

    Args:
        folder: the exported model.
        title: heading.
        facts: the part that depends on the format.
        engine: name of the engine.
        lineage: how the model was made; None if it is not recorded.
        notes: lines on the conversion of the weights.
        rows: table of measurements, one mapping from column to value per row.
        verified: the result of the verification, or the reason why there is none.
        base_model: Hub id of the base model; None: what the lineage says.
        kinds: kinds of the stages by which the model was made, for the tags.
        datasets: references of the texts that it learned from; those that are no Hub ids are left out.
    """
    parts = [
        f"# {escaped(title)}",
        _lineage(lineage),
        *(["## Weights\n\n" + "\n".join(f"- {without_tags(note)}" for note in notes)] if notes else []),
        "## Measured\n\n" + (markdown_table(rows) if rows else "Nothing was measured."),
        "## Verification\n\n" + _verification(verified, engine),
        "## How to load\n\n" + facts.how_to_load,
    ]
    data = _data(lineage, facts, base_model)
    data.tags = list(dict.fromkeys([*data.tags, *(TAGS[kind] for kind in kinds if kind in TAGS)]))
    if named := sorted({one for one in datasets if _is_hub_id(one)}):
        data.datasets = named
    measured = {column for row in rows for column in row}
    if metrics := [metric for header, metric in METRICS.items() if any(one.startswith(header) for one in measured)]:
        data.metrics = metrics
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n").save(folder / "README.md")


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table: columns in order of first appearance, floats with four digits, "-" if missing."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [[escaped(column) for column in columns], ["---"] * len(columns)]
    lines += [[_cell(row.get(column)) for column in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else escaped(value)


def _data(lineage: Lineage | None, facts: CardFacts, base_model: str | None) -> Any:
    """The card's metadata, without a base model that is not a Hub id and without an unknown licence."""
    named = base_model or (lineage.base_model if lineage else "")
    base = named if _is_hub_id(named) else None
    return ModelCardData(
        base_model=base,
        base_model_relation=("quantized" if facts.quantized else "finetune") if base else None,
        license=" ".join(lineage.licence.split()) if lineage and lineage.licence else None,
        library_name=facts.library,
        pipeline_tag=facts.task,
        tags=["distillation", *facts.tags],
    )


def _lineage(lineage: Lineage | None) -> str:
    licence = lineage.licence if lineage else None
    stated = f"licence: {licence}, as the base model states it" if licence else None
    lines = [stated or "licence: unknown - check the base model before you publish"]
    if lineage is None:
        lines.append("base model: not recorded")
    else:
        lines.append(f"base model: {public_name(lineage.base_model)}")
        lines.append(f"made from: {public_name(lineage.parent)}, by stage {lineage.stage} ({lineage.kind})")
        if lineage.teacher:
            lines.append(f"teacher: {public_name(lineage.teacher)}")
        lines.append(f"input hash: {lineage.input_hash}")
    return "\n".join(f"- {escaped(line)}" for line in lines)


def _verification(result: VerifyResult | str, engine: str) -> str:
    if isinstance(result, str):
        return f"This export was not verified: {escaped(result)}."
    return (
        f"Loaded in {engine} and compared with the trained model on {result.tokens} tokens: "
        f"KL {result.kl:.3g} nats per token (largest {result.worst_kl:.3g}), largest logit difference "
        f"{result.max_abs_logit:.3g} (mean {result.mean_abs_logit:.3g}), same top token for "
        f"{result.top1_agreement:.2%}. Weights: {result.weight_bytes} bytes."
    )


def public_name(reference: str) -> str:
    """A reference without local paths: a Hub id or name unchanged, and only the last part of a folder's path."""
    return reference if _is_hub_id(reference) else Path(reference).name or reference


def _is_hub_id(reference: str) -> bool:
    return HUB_ID.fullmatch(reference) is not None and not os.path.exists(reference)
