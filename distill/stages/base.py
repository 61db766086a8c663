"""The contract of a stage: what it reads, what it leaves, and what the runner hands it."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import yaml

from distill.core.artifact import Artifact, Lineage, fingerprint, hash_of, replacing, write_lineage, write_text
from distill.core.run import Run
from distill.core.spec import Spec
from distill.core.world import ALONE, World
from distill.data.spec import DataSpec
from distill.tracking.spec import LoggingSpec
from distill.training.spec import BudgetSpec, ComputeSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from distill.data.corpus import Corpus
    from distill.tracking.wandb import SafeLogger

SELF = "self"
"""What a stage writes in place of a teacher to learn from its student as it starts."""


class StageSpec(Spec):
    """One step of a run. Its name in the recipe is its address; its kind defaults to the name."""

    makes_model: ClassVar[bool] = False
    """Whether later stages may name it as a model."""
    makes_signal: ClassVar[bool] = False
    """Whether later stages may name it as the teacher that they learn from, though it is no model."""

    kind: str

    def references(self) -> list[tuple[tuple[str | int, ...], str]]:
        """The models that it reads: (key path inside the stage, reference).

        A reference is "teacher", an earlier stage, a folder or a Hub id.
        """
        return []

    def speaker(self) -> str | None:
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
        return isinstance(self, BudgetSpec) and bool(self.num_tokens or self.num_steps)

    def missing(self) -> str | None:
        """What this machine lacks to run it, in one line with the mend; None when all is there."""
        return None

    def outdated(self, figures: dict[str, Any]) -> str | None:
        """Why a finished stage is worth running again here, by its figures; None when it is not."""
        return None

    def shown(self, figures: dict[str, Any]) -> str | None:
        """What people will open, by the figures: a name in the stage's folder; None when there is nothing."""
        return None

    def run(self, context: StageContext) -> dict[str, Any]:
        """Do the work inside ``context.folder``.

        Returns:
            Figures for the ``DONE`` marker.
        """
        raise NotImplementedError


@dataclass
class Session:
    """What the stages of one process share: the recipe's common settings and the corpora that are open.

    Attributes:
        run: the run folder.
        recipe: the recipe's name.
        text: the recipe as resolved YAML.
        teacher: the teacher's reference, or None.
        seed: of everything random.
        stages: all stages of the recipe, in order.
        say: prints one line for people.
        world: the processes of the run, and which of them this is.
    """

    run: Run
    recipe: str
    text: str
    teacher: str | None
    data: DataSpec
    compute: ComputeSpec
    logging: LoggingSpec
    seed: int
    stages: dict[str, StageSpec]
    command: str
    say: Callable[[str], None] = print
    world: World = ALONE
    _tokenizer: PreTrainedTokenizerFast | None = None
    _corpus: Corpus | None = None
    _logger: SafeLogger | None = None
    _whole: Session | None = None
    _cut: dict[str, Session] = field(default_factory=dict)

    @property
    def is_sent_models(self) -> bool:
        """Whether this process is sent its shares of the models that are trained, instead of reading them whole."""
        return self.compute.strategy == "fsdp" and self.world.rank > 0

    @property
    def is_cut(self) -> bool:
        """Whether the text is read in a part of the run's tokens."""
        return self._whole is not None

    def speaking(self, reference: str | None) -> Session:
        """The session in which the text is read in a model's tokens: another one where its vocabulary was cut."""
        from distill.data.tokenizer import load_tokenizer

        if reference is None or reference == SELF:
            return self
        artifact = self.artifact(reference)
        lineage = artifact.lineage()
        if lineage is None or lineage.num_tokens is None:
            return self
        if artifact.location not in self._cut:
            own = load_tokenizer(artifact.location)
            self._cut[artifact.location] = replace(self, _tokenizer=own, _corpus=None, _whole=self._whole or self)
        return self._cut[artifact.location]

    def artifact(self, reference: str) -> Artifact:
        """The model behind a reference of the recipe."""
        from distill.models.load import locate

        reference = self.teacher_behind(reference)
        if reference in self.stages:
            return self.run.model(reference)
        if reference == "teacher":
            assert self.teacher is not None
            return Artifact("teacher", locate(self.teacher))
        return Artifact(reference, locate(reference))

    def teacher_behind(self, reference: str) -> str:
        """The model whose output a stage has written down, when ``reference`` is such a stage; else itself."""
        stage = self.stages.get(reference)
        return str(getattr(stage, "teacher", reference)) if stage is not None and stage.makes_signal else reference

    @cached_property
    def data_hash(self) -> str:
        """Stands for the text and how it is cut; another text under the same name is another hash.

        Raises:
            InputError: the text is not there.
        """
        texts = [source.fingerprint() for source in (self.data.train, self.data.validation) if source is not None]
        wanted = self.data.tokenizer
        place = fingerprint(self.artifact(wanted).location) if isinstance(wanted, str) else None
        return hash_of(self.data.model_dump(mode="json"), texts, place)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The one tokenizer of the run: the teacher's, another model's, or one trained on the corpus."""
        from distill.data.corpus import open_tokenizer
        from distill.data.tokenizer import load_tokenizer

        if self._tokenizer is None:
            wanted = self.data.tokenizer
            if isinstance(wanted, str):
                self._tokenizer = load_tokenizer(self.artifact(wanted).location)
            else:
                self._tokenizer = open_tokenizer(self.data, "", self.run.folder / "data")
        return self._tokenizer

    def corpus(self) -> Corpus:
        """The run's data, tokenised and packed; opened once."""
        from distill.data.corpus import Corpus

        if self._corpus is None:
            tokenizer = self.tokenizer()
            self._corpus = Corpus.open(self.data, tokenizer, self.run.folder / "data", self.seed, len(tokenizer))
            self.say(f"  {self._corpus.summary()}")
        return self._corpus

    def logger(self) -> SafeLogger | None:
        """The W&B run that all stages log to, opened once; its id stays with the run folder, so that curves go on.

        None when it is off, and in all processes but the first.
        """
        from distill.tracking.wandb import make_logger

        if self._whole is not None:
            return self._whole.logger()
        if self._logger is None and self.logging.wandb != "disabled" and self.world.rank == 0:
            file = self.run.folder / "wandb-id"
            if not file.is_file():
                write_text(file, uuid.uuid4().hex[:8])
            config = yaml.safe_load(self.text)
            self._logger = make_logger(self.logging, self.run.folder, file.read_text(), self.recipe, config)
        return self._logger

    def close(self) -> None:
        """Close what is open; says how to send an offline W&B run."""
        if self._logger is not None:
            from distill.tracking.wandb import finish

            if line := finish(self._logger):
                self.say(f"W&B is offline; to send this run: {line}")


class Released(Exception):
    """What was left to do of a stage by all processes is done; all but the first go on to the next one."""


@dataclass
class StageContext:
    """What the runner hands to one stage.

    Attributes:
        session: shared with the other stages.
        name: the stage's name in the recipe.
        folder: its folder; all that it writes goes here.
        input_hash: hash of everything that it reads.
    """

    session: Session
    name: str
    folder: Path
    input_hash: str

    def say(self, line: str) -> None:
        """Print one line for people."""
        self.session.say(f"  {line}")

    def write_model(
        self,
        save: Callable[[Path], None],
        *,
        kind: str,
        parent: str,
        teacher: str | None,
        figures: dict[str, Any],
        mask: str | None = None,
        tokenizer: PreTrainedTokenizerFast | None = None,
    ) -> Artifact:
        """Write the stage's model folder, whole or not at all, with tokenizer and lineage.

        Args:
            save: writes weights and config into the folder it is given.
            kind: the stage's kind.
            parent: reference of the model that this one was made from.
            teacher: reference of the model that it learned from.
            figures: go into the lineage.
            mask: see :class:`~distill.core.artifact.Lineage`.
            tokenizer: with the vocabulary cut; None is that of the session.
        """
        from distill.models.load import licence_of

        artifact = self.session.run.model(self.name)
        above = self.session.artifact(parent)
        line = above.lineage()
        with replacing(Path(artifact.location)) as folder:
            save(folder)
            speaks = tokenizer or self.session.tokenizer()
            speaks.save_pretrained(folder)
            write_lineage(
                folder,
                Lineage(
                    stage=self.name,
                    kind=kind,
                    parent=parent,
                    teacher=teacher,
                    base_model=line.base_model if line else self._base_model(parent),
                    licence=line.licence if line else licence_of(above.location),
                    input_hash=self.input_hash,
                    figures=figures,
                    mask=mask,
                    num_tokens=len(speaks) if tokenizer is not None or self.session.is_cut else None,
                ),
            )
        return artifact

    def _base_model(self, parent: str) -> str:
        return str(self.session.teacher) if parent == "teacher" else parent
