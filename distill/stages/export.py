"""A model as a deliverable: exported, reloaded in its engine, and held against the trained one."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from distill.core.artifact import Artifact, replacing
from distill.core.spec import NAME
from distill.exporters import EXPORTERS, HuggingFace
from distill.exporters.base import EngineMissing, ExporterSpec, VerifyResult
from distill.stages.base import StageContext, StageSpec
from distill.stages.evaluate import local_folder, measured_rows


class Export(StageSpec):
    """Write a model for others: weights, tokenizer, model card with the measured table; then verify it."""

    kind: Literal["export"] = "export"
    model: str
    """What to export: an earlier stage, a folder or a Hub id."""
    target: Annotated[ExporterSpec, EXPORTERS] = HuggingFace()
    """The format."""
    title: str | None = Field(None, pattern=NAME)
    """What the model and its folder are called: letters, digits, . _ -; unset: <recipe>-<model>."""
    verify_sequences: int = Field(8, ge=1)
    """Sequences of validation text on which the export is held against the trained model."""

    makes_model: ClassVar[bool] = False

    def references(self) -> list[tuple[tuple[str | int, ...], str]]:
        """The model that is exported."""
        return [(("model",), self.model)]

    def reads(self, earlier: list[str]) -> list[str]:
        """The model, and whatever was measured before, since the card shows it."""
        return [self.model, *earlier]

    def missing(self) -> str | None:
        """A package that writes the format."""
        return self.target.missing()

    def outdated(self, figures: dict[str, Any]) -> str | None:
        """It was not verified for want of the engine, which is there now."""
        can_now = "unverified" in figures and self.target.missing_engine() is None
        return f"made again, as {self.target.engine_module} is installed now" if can_now else None

    def shown(self, figures: dict[str, Any]) -> str | None:
        """The deliverable."""
        return str(figures["folder"])

    def run(self, context: StageContext) -> dict[str, Any]:
        """Export, reload, compare; only an export that was not found wrong takes its place, and one that could
        not be verified says so."""
        from distill.data.tokenizer import load_tokenizer
        from distill.exporters.model_card import write_card
        from distill.models.load import load_model

        session = context.session
        source = Path(local_folder(session.artifact(self.model)))
        title = self.title or f"{session.recipe}-{Path(self.model).name}"
        batches = list(session.corpus().validation_loader(batch_size=4, num_sequences=self.verify_sequences))
        place = context.folder / title
        with replacing(place) as folder:
            notes = self.target.export(source, folder, title=title)
            verified: VerifyResult | str
            try:
                trained = load_model(str(source), dtype="float32", tasks=self.target.tasks)
                verified = self.target.verify(trained, folder, batches, load_tokenizer(source))
            except EngineMissing as missing:
                verified = str(missing)
            write_card(
                folder,
                title=title,
                facts=self.target.card(folder),
                engine=self.target.engine,
                lineage=Artifact(self.model, str(source)).lineage(),
                notes=notes,
                rows=_card_rows(measured_rows(context)),
                verified=verified,
            )
        for note in notes:
            context.say(note)
        if isinstance(verified, str):
            context.say(f"{place}: {verified}")
            return {"folder": place.name, "unverified": verified}
        context.say(
            f"{place}: {verified.weight_bytes / 1e6:.2f} MB; run by {self.target.engine.rstrip(',')}: logit difference "
            f"{verified.max_abs_logit:.1e} at most, {verified.mean_abs_logit:.1e} in the mean; KL {verified.kl:.1e}, "
            f"{verified.worst_kl:.1e} at worst; same first token {verified.top1_agreement:.1%}"
        )
        return {"folder": place.name, **asdict(verified)}


def _card_rows(rows: list[Any]) -> list[dict[str, str]]:
    from distill.tracking.tables import cell, kernel, shown

    return [{"model": row.name, **{c.header: cell(row, c) for c in shown(rows)}, "kernel": kernel(row)} for row in rows]
