"""The model card: what the model is made from, what was measured, how to load it. Nothing in it is guessed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distill.core.artifact import Lineage
from distill.exporters.base import CardFacts, VerifyResult

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
    verified: VerifyResult | str = "nobody has held it against the trained model",
) -> None:
    """Write ``README.md`` into an exported folder, over an earlier one.

    Args:
        folder: the exported model.
        title: heading.
        facts: of its format.
        engine: what runs it.
        lineage: where the model comes from; None when it is not recorded.
        notes: what was done to the weights, a line each.
        rows: the measured table, one mapping of column to value a row.
        verified: what verification measured, or why there was none.
    """
    from huggingface_hub import ModelCard

    parts = [
        f"# {title}",
        _lineage(lineage),
        *(["## Weights\n\n" + "\n".join(f"- {note}" for note in notes)] if notes else []),
        "## Measured\n\n" + (markdown_table(rows) if rows else "Nothing was measured."),
        "## Verification\n\n" + _verification(verified, engine),
        "## How to load\n\n" + facts.how_to_load,
    ]
    data = _data(lineage, facts)
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n").save(folder / "README.md")


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table: columns as they first appear, floats to four digits, "-" for what is not there."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns, ["---"] * len(columns), *([_cell(row.get(column)) for column in columns] for row in rows)]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else " ".join(str(value).split())


def _data(lineage: Lineage | None, facts: CardFacts) -> Any:
    """The card's metadata. A base model that is no Hub id, and an unknown licence, are left out, not made up."""
    from huggingface_hub import ModelCardData

    base = lineage.base_model if lineage and _is_hub_id(lineage.base_model) else None
    return ModelCardData(
        base_model=base,
        base_model_relation=("quantized" if facts.quantized else "finetune") if base else None,
        license=lineage.licence if lineage else None,
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
    return "\n".join(f"- {line}" for line in lines)


def _verification(result: VerifyResult | str, engine: str) -> str:
    if isinstance(result, str):
        return f"This export was not verified: {result}."
    return (
        f"Loaded in {engine} and held against the trained model on {result.tokens} tokens: "
        f"KL {result.kl:.3g} nats a token (worst {result.worst_kl:.3g}), largest logit difference "
        f"{result.max_abs_logit:.3g} (mean {result.mean_abs_logit:.3g}), same first token in "
        f"{result.top1_agreement:.2%}. Weights: {result.weight_bytes} bytes."
    )


def public_name(reference: str) -> str:
    """A reference as it may be published: a Hub id or name as it is, of a folder only its own name."""
    return reference if _is_hub_id(reference) else Path(reference).name or reference


def _is_hub_id(reference: str) -> bool:
    return HUB_ID.fullmatch(reference) is not None and not Path(reference).exists()
