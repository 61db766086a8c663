"""The contract of a stage: what it reads, what it says before the run, and what it does in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, ClassVar, Literal

from distill.core.errors import InputError
from distill.core.spec import Spec
from distill.data.files import File
from distill.data.spec import DataSpec
from distill.evaluation.tasks.base import TaskSpec
from distill.models.configs import config_of, largest
from distill.pruning.layout import Config
from distill.stages.forecast import Forecast
from distill.training.spec import BudgetSpec, ComputeSpec

SELF = "self"
"""What a stage writes in place of a teacher to learn from its student as it starts."""


class StageSpec(Spec):
    """One step of a run. Its name in the recipe is its address; its kind defaults to the name."""

    makes_model: ClassVar[bool] = False
    """Whether later stages may name it as a model."""
    makes_signal: ClassVar[bool] = False
    """Whether later stages may name it as the teacher that they learn from, though it is no model."""

    makes_data: ClassVar[bool] = False
    """Whether later stages may name it under ``data``, to read the rows that it makes."""

    makes_file: ClassVar[bool] = False
    """Whether it makes a file for an engine, which stages that read files may name among their ``models``."""
    reads_files: ClassVar[bool] = False
    """Whether it may name such a file."""

    kind: str

    def references(self) -> list[tuple[tuple[str | int, ...], str]]:
        """The models that it reads: (key path inside the stage, reference).

        A reference is "teacher", an earlier stage, a folder or a Hub id.
        """
        return []

    def same_tokens(self) -> list[tuple[tuple[str | int, ...], str]]:
        """Those of :meth:`references` that must have the tokens of the run."""
        return self.references()

    def teacher_named(self) -> str | None:
        """The reference under its key ``teacher``; None where it reads no teacher beside its student."""
        return dict(self.references()).get(("teacher",))

    def vocabulary_of(self) -> str | None:
        """The model whose tokens the stage reads its text in, where its vocabulary was cut; None: those of the run."""
        return next((reference for _, reference in self.references()), None)

    def reads(self, earlier: list[str]) -> list[str]:
        """References of all models that the result depends on.

        Args:
            earlier: names of the stages before it.
        """
        return [reference for _, reference in self.references()]

    def takes_all_ranks(self) -> bool:
        """Whether all processes of a run work at it, which is when it trains; else the first does it alone."""
        return isinstance(self, BudgetSpec) and self.is_trained()

    def mistakes(self, data: DataSpec) -> Iterator[tuple[tuple[str | int, ...], str]]:
        """What of the recipe's text it cannot work with: (key path inside the stage, line)."""
        yield from ()

    def refuses(self, name: str, student: StageSpec) -> str | None:
        """Why another stage cannot learn from what this one, of that name, writes down, as one line; else None."""
        return None

    def forecast(self, view: View) -> Forecast:
        """What it will do, by what is known before the run. No stage may do without; nothing heavy is imported.

        Raises:
            InputError: it cannot do it, whatever its model will be.
        """
        raise NotImplementedError

    def reading(self) -> str:
        """The models that it names, for :attr:`Forecast.reads`."""
        named = dict.fromkeys(reference for _, reference in self.references())
        return f"reads {', '.join(named)}" if named else ""

    @classmethod
    def form_as_written(cls, section: Mapping[str, Any]) -> Literal["conversations", "text"]:
        """As :attr:`made_form`, from the stage's section of a recipe that nobody has checked yet."""
        return "conversations"

    @property
    def made_form(self) -> Literal["conversations", "text"]:
        """What the rows are that it makes, where it makes some."""
        return "conversations"

    @property
    def made_documents(self) -> bool:
        """Whether some rows that it makes have the column document.

        Raises:
            InputError: a file that says so is wrong.
        """
        return False

    def files(self) -> list[File]:
        """Files that it reads besides models and the run's text; where one changes, its result is made again.

        Raises:
            InputError: one is not there.
        """
        return []

    def measures(self) -> list[str]:
        """Names of the figures that it measures, which the recipe's ``require`` may bound."""
        return []

    def asks(self) -> Mapping[str, TaskSpec]:
        """Tasks that it asks of the models that it measures, by name."""
        return {}

    def measured_models(self, earlier: list[str]) -> list[str]:
        """References of the models whose figures it measures.

        Args:
            earlier: names of the stages before it that make a model.
        """
        return []

    def missing(self) -> str | None:
        """What this machine lacks to run it, in one line with what to do about it; None when all is there."""
        return None

    def outdated(self, figures: dict[str, Any]) -> str | None:
        """Why a finished stage is worth running again here, by its figures; None when it is not."""
        return None

    def shown(self, figures: dict[str, Any]) -> str | None:
        """What people will open, by the figures: a name in the stage's folder; None when there is nothing."""
        return None

    def result(self, figures: dict[str, Any]) -> str | None:
        """The file or folder, within its own, that the stage is run for and makes again when it is lost; None: none."""
        return "model" if self.makes_model else self.shown(figures)

    def rehearse(self, context: Any) -> None:
        """Try what the end of the stage needs, before anything is computed; see :mod:`distill.stages.rehearsal`.

        It is called for every stage that will run, before the first of them starts; stages before this one may not have
        run yet. A stage that makes a model is rehearsed again at its own start, when the model that it reads is there.

        Args:
            context: a :class:`~distill.stages.session.StageContext`, whose folder need not be there.

        Raises:
            InputError: the end would fail by the user's files.
            MachineError: it would fail by the machine.
        """

    def run(self, context: Any) -> dict[str, Any]:
        """Do the work inside ``context.folder``.

        A stage whose run is long is a folder: ``spec.py``, which imports nothing heavy, and ``run.py``, which has the
        function ``run(stage, context)`` that is called here. Any other stage overrides this method.

        Args:
            context: a :class:`~distill.stages.session.StageContext`.

        Returns:
            Figures for the ``DONE`` marker.
        """
        beside = import_module(f"{type(self).__module__.removesuffix('.spec')}.run")
        figures: dict[str, Any] = beside.run(self, context)
        return figures


@dataclass(frozen=True)
class View:
    """What one stage sees of a recipe before the run.

    Attributes:
        name: the stage's name.
        stages: all stages of the recipe, in order.
        data: the text.
        compute: the machine.
        known: "teacher", and the name of each stage before this one -> what is known of it.
        teacher: the recipe's teacher as it names it, or None.
    """

    name: str
    stages: Mapping[str, StageSpec]
    data: DataSpec
    compute: ComputeSpec
    known: Mapping[str, Forecast]
    teacher: str | None = None

    def configs(self, reference: str) -> Sequence[Config]:
        """Every config that a model may have; none where nothing is known of it.

        Raises:
            InputError: no folder of a model, and no Hub id.
        """
        if reference in self.known:
            return self.known[reference].makes
        found = config_of(reference)
        return () if found is None else (found,)

    def config(self, reference: str) -> Config | None:
        """The config of a model; of several that it may have, the one of most parameters."""
        return largest(self.configs(reference))

    def vocabulary(self) -> int | None:
        """The most tokens that the run's tokenizer can have; None where the model that it comes from is not known."""
        wanted = self.data.tokenizer
        if not isinstance(wanted, str):
            return wanted.vocab_size
        size = (self.config(wanted) or {}).get("vocab_size")
        return size if isinstance(size, int) else None

    def is_open(self, reference: str) -> bool:
        """Whether the size of a model shows only during the run."""
        return reference in self.known and self.known[reference].is_open

    def of_model(self, reference: str, check: Callable[[View, Config | None], None]) -> Forecast:
        """What is made of one model whose config stays as it is.

        Args:
            reference: of that model.
            check: raises InputError when the stage cannot work with the model, whose config it is given (None: not
                known) with a view in which the model has that config alone.
        """
        made, fits, refused = self.configs(reference), [], []
        for config in made or (None,):
            try:
                check(self if config is None else self._supposing(reference, config), config)
                fits.append(config)
            except InputError as error:
                refused.append(error)
        makes = [config for config in fits if config is not None]
        return Forecast(
            makes=makes if fits else made,  # what later stages are compared with even where this one is refused
            is_open=self.is_open(reference),
            grids=(),
            refused=refused,
            is_refused=not fits,
        )

    def _supposing(self, reference: str, config: Config) -> View:
        known = replace(self.known.get(reference, Forecast()), makes=(config,))
        return replace(self, known={**self.known, reference: known})
