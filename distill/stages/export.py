"""A model as a deliverable: exported, reloaded in its engine, and compared with the trained one."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from distill.core.artifact import Artifact, replacing
from distill.core.spec import NAME
from distill.exporters import EXPORTERS, HuggingFace
from distill.exporters.base import EngineMissing, ExporterSpec, VerifyResult
from distill.stages.base import StageSpec, View
from distill.stages.checks import check_task
from distill.stages.evaluate.rows import measured_rows
from distill.stages.forecast import Forecast

if TYPE_CHECKING:
    from distill.stages.session import StageContext


LONGEST = 100
"""Characters of a title that is made of other names."""


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
    """Sequences of validation text on which the export is compared with the trained model."""

    makes_file: ClassVar[bool] = True

    def references(self) -> list[tuple[tuple[str | int, ...], str]]:
        """The model that is exported."""
        return [(("model",), self.model)]

    def same_tokens(self) -> list[tuple[tuple[str | int, ...], str]]:
        """None: a model is exported with its own tokenizer."""
        return []

    def reads(self, earlier: list[str]) -> list[str]:
        """The model, and whatever was measured before, since the card shows it."""
        return [self.model, *earlier]

    def forecast(self, view: View) -> Forecast:
        """The format, and the engine if it is not here to verify it.

        Raises:
            InputError: the model cannot be written so.
        """
        model = view.known.get(self.model)
        if model is not None and model.grids is not None:
            self.target.check_grids(model.grids, model.activations, model.embeddings)
        check_task(self, view, self.target.tasks)
        unverified = None if self.missing() else self.target.missing_engine()
        does = self.target.kind if unverified is None else f"{self.target.kind}, {unverified}"
        return Forecast(reads=self.reading(), does=[does])

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

    def rehearse(self, context: StageContext) -> None:
        """Compare the target with the tokenizer and the architecture."""
        from distill.stages.rehearsal import check_target

        check_target(context, self.model, self.target)

    def run(self, context: StageContext) -> dict[str, Any]:
        """Export, reload, compare; only an export that was not found wrong takes its place, and one that could
        not be verified says so."""
        from distill.data.tokenizer import load_tokenizer
        from distill.exporters.model_card import write_card
        from distill.models.load import load_model
        from distill.stages.models import local_folder

        session = context.session
        source = Path(local_folder(session.artifact(self.model)))
        title = self.title or re.sub("[^A-Za-z0-9._-]+", "-", f"{session.recipe}-{Path(self.model).name}")[:LONGEST]
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
    from distill.reporting.tables import cell, kernel, shown

    return [{"model": row.name, **{c.header: cell(row, c) for c in shown(rows)}, "kernel": kernel(row)} for row in rows]
