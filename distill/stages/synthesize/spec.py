"""A data set that a writer makes: answers to prompts, questions about documents, or paraphrases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from distill.core.errors import InputError
from distill.data.files import File
from distill.models.head_names import task_in
from distill.stages.base import StageSpec, View
from distill.stages.forecast import Forecast
from distill.stages.synthesize.filters_spec import FiltersSpec
from distill.stages.synthesize.makers import MAKERS, MakerSpec
from distill.stages.synthesize.row_files import FOLDER
from distill.stages.synthesize.writer_spec import ServerSpec, WriterChoice


class Synthesize(StageSpec):
    """Have a model or a server write training rows, which later stages read by ``data: <this stage>``."""

    makes_data: ClassVar[bool] = True

    kind: Literal["synthesize"] = "synthesize"
    make: Annotated[MakerSpec, MAKERS]
    """What is made: answers, qna (questions and answers) or rewrite (paraphrases)."""
    writer: WriterChoice = "teacher"
    """Writer: "teacher", an earlier stage, a folder or a Hub id with a chat template; or {server: http://...}."""
    batch_size: int = Field(8, ge=1)
    """Number of requests per batch, if the writer is a model."""
    filters: FiltersSpec = FiltersSpec()
    """Which rows are dropped."""
    rows_per_file: int = Field(10_000, ge=1)
    """Number of rows per file of the data set."""

    @model_validator(mode="after")
    def _the_writer_can(self) -> Synthesize:
        if isinstance(self.writer, ServerSpec):
            if (why := self.make.why_no_server()) is not None:
                raise ValueError(f"make: {why}, which a server does not tell; name a model as writer")
            if self.filters.min_likelihood_gain is not None:
                raise ValueError(
                    "filters.min_likelihood_gain needs the probability of a given text, which a server does not tell; "
                    "name a model as writer, or use filters.judge"
                )
        return self

    @model_validator(mode="after")
    def _filters_have_an_effect(self) -> Synthesize:
        set_ = {"judge": self.filters.judge, "min_likelihood_gain": self.filters.min_likelihood_gain is not None}
        for key in (key for key, is_set in set_.items() if is_set and not self.make.asks_about_documents):
            raise ValueError(
                f"filters.{key} has no effect on make: {self.make.kind}, whose rows are no questions about a document; "
                "remove it"
            )
        return self

    @classmethod
    def form_as_written(cls, section: Mapping[str, Any]) -> Literal["conversations", "text"]:
        """What the rows of the maker that is named are."""
        make = section.get("make")
        kind = make.get("kind") if isinstance(make, dict) else make
        spec = MAKERS[kind] if isinstance(kind, str) and kind in MAKERS else MakerSpec
        return spec.holds if issubclass(spec, MakerSpec) else "conversations"

    @property
    def made_form(self) -> Literal["conversations", "text"]:
        """What its rows are."""
        return type(self.make).holds

    @property
    def made_documents(self) -> bool:
        """Whether its maker gives rows the text that answers them."""
        return self.make.has_documents()

    def references(self) -> list[tuple[tuple[str | int, ...], str]]:
        """The writer, where it is a model."""
        return [(("writer",), self.writer)] if isinstance(self.writer, str) else []

    def same_tokens(self) -> list[tuple[tuple[str | int, ...], str]]:
        """None: rows are text."""
        return []

    def vocabulary_of(self) -> str | None:
        """Rows are text."""
        return None

    def files(self) -> list[File]:
        """Those of the maker."""
        return self.make.files()

    def missing(self) -> str | None:
        """A package that the maker lacks."""
        return self.make.missing()

    def rehearse(self, context: Any) -> None:
        """Read the writer's config and tokenizer."""
        from distill.stages.rehearsal import check_writer

        check_writer(context, self.writer)

    def result(self, figures: dict[str, Any]) -> str:
        """The rows."""
        return FOLDER

    def forecast(self, view: View) -> Forecast:
        """What is read and asked."""
        lines = self.make.check()
        if isinstance(self.writer, ServerSpec):
            lines += self.writer.notes()
            who = f"{self.writer.server} writes" + (f" with {self.writer.model}" if self.writer.model else "")
        else:
            who = f"{self.writer} writes"
            config = view.config(self.writer)
            if config is not None and task_in(config) != "causal_lm":
                raise InputError(f"writer: {self.writer} is of type {config['model_type']}, which writes no text")
        return Forecast(reads=who, does=[f"makes {self.make.kind}"], notes=lines)
