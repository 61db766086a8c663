"""A model as a deliverable: exported, reloaded in its engine, and compared with the trained one."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from distill.core.artifact import Artifact, replacing
from distill.core.spec import HUB_REPOSITORY, NAME
from distill.data.mixture import Mixture
from distill.data.spec import DataSpec
from distill.exporters import EXPORTERS, HuggingFace
from distill.exporters.base import EngineMissing, ExporterSpec, VerifyResult
from distill.models.configs import count
from distill.reporting.tables import cell, kernel, shown
from distill.stages.base import StageSpec, View
from distill.stages.checks import check_task
from distill.stages.evaluate.stored_rows import measured_rows
from distill.stages.forecast import Forecast

if TYPE_CHECKING:
    from distill.stages.session import Session, StageContext


"""A repository of the Hub: letters, digits, . _ - on both sides of one slash."""
LONGEST = 100
"""Characters of a title that is made of other names."""


class Export(StageSpec):
    """Export a model: weights, tokenizer and a model card with the table of measurements; then verify it."""

    kind: Literal["export"] = "export"
    model: str
    """Model to export: an earlier stage, a folder or a Hub id."""
    target: Annotated[ExporterSpec, EXPORTERS] = HuggingFace()
    """Format of the export."""
    title: str | None = Field(None, pattern=NAME)
    """Name of the model and of its folder: letters, digits, . _ -; unset: <recipe>-<model>."""
    push_to_hub: str | None = Field(None, pattern=HUB_REPOSITORY)
    """Repository on the Hub (ORG/NAME) for the verified export. Without `upload`, the list of files is only printed.
    Unset is off."""
    upload: bool = False
    """Whether to upload to push_to_hub, as a private repository, with the token of the environment (HF_TOKEN)."""
    verify_sequences: int = Field(8, ge=1)
    """Number of sequences of validation text on which the export is compared with the trained model."""

    makes_file: ClassVar[bool] = True

    @model_validator(mode="after")
    def _upload_has_a_target(self) -> Export:
        if self.upload and self.push_to_hub is None:
            raise ValueError("upload has no effect without push_to_hub; set push_to_hub: ORG/NAME, or remove it")
        return self

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
        size = count(view.config(self.model)) or 0
        return Forecast(reads=self.reading(), does=[does], disk_bytes=size * self.target.bytes_per_weight())

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
        """Compare the target with the tokenizer, the architecture and the files; look for the token of an upload."""
        from distill.exporters.upload import check_token
        from distill.stages.rehearsal import check_target

        check_target(context, self.model, self.target)
        if self.upload and self.push_to_hub is not None:
            check_token(self.push_to_hub)

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
                kinds=_kinds(session, self.model),
                datasets=_texts(session.data),
            )
        for note in notes:
            context.say(note)
        if isinstance(verified, str):
            context.say(f"{place}: {verified}")
            if self.push_to_hub is not None:
                context.say(f"not pushed to {self.push_to_hub}, as it is not verified")
            return {"folder": place.name, "unverified": verified}
        context.say(
            f"{place}: {verified.weight_bytes / 1e6:.2f} MB; run by {self.target.engine.rstrip(',')}: logit difference "
            f"{verified.max_abs_logit:.1e} at most, {verified.mean_abs_logit:.1e} in the mean; KL {verified.kl:.1e}, "
            f"{verified.worst_kl:.1e} at worst; same first token {verified.top1_agreement:.1%}"
        )
        self._push(context, place)
        return {"folder": place.name, **asdict(verified)}

    def _push(self, context: StageContext, place: Path) -> None:
        """Upload the export, or print what an upload would send."""
        if self.push_to_hub is None:
            return
        from distill.exporters.upload import planned, upload

        if self.upload:
            context.say(f"uploaded: {upload(place, self.push_to_hub)}")
            return
        for line in planned(place, self.push_to_hub):
            context.say(line)
        context.say("nothing was uploaded; set upload: true for that")


def _kinds(session: Session, reference: str) -> list[str]:
    """Kinds of the stages of this run by which a model was made, the last one first."""
    kinds: list[str] = []
    while reference in session.stages:
        kinds.append(session.stages[reference].kind)
        lineage = session.artifact(reference).lineage()
        if lineage is None or lineage.parent == reference:
            break
        reference = lineage.parent
    return kinds


def _texts(data: DataSpec) -> list[str]:
    """References of the sources on the Hub that a run trains on."""
    sources = data.train.sources.values() if isinstance(data.train, Mixture) else [data.train]
    return [str(path) for source in sources if source.kind == "hub" and (path := getattr(source, "path", None))]


def _card_rows(rows: list[Any]) -> list[dict[str, str]]:
    return [{"model": row.name, **{c.header: cell(row, c) for c in shown(rows)}, "kernel": kernel(row)} for row in rows]
