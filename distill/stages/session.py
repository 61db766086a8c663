"""What the stages of one process share, and what the runner hands to one of them."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from transformers import PreTrainedTokenizerFast

from distill.core.artifact import Artifact, Lineage, fingerprint, hash_of, replacing, write_lineage, write_text
from distill.core.outside import read
from distill.core.run_folder import Run
from distill.core.sweep import trial_of_sweep
from distill.core.world import SINGLE_PROCESS, World
from distill.data.chat_encoder import ChatPrompts
from distill.data.corpus import Corpus, trained_tokenizer
from distill.data.spec import DataSpec
from distill.data.split import RULE
from distill.data.task_corpus import open_rows
from distill.data.tokenizer import check_written, load_tokenizer
from distill.models.card import licence_of
from distill.models.load import locate
from distill.stages.base import SELF, StageSpec
from distill.stages.chat import other_templates, prompts_of, template_of
from distill.stages.text import data_of, located, made_sources, spoken
from distill.stages.word_candidates import candidates_of
from distill.tracking.spec import LoggingSpec
from distill.training.spec import ComputeSpec

if TYPE_CHECKING:
    from distill.tracking.wandb import SafeLogger  # Lightning, which takes seconds to import


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
        require: what is required of the run's figures.
        gather: in the first of several processes: called with a session whose text it is about to open, so that the
            others tokenize a part of it.
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
    world: World = SINGLE_PROCESS
    require: Mapping[str, str] = field(default_factory=dict)
    gather: Callable[[Session], None] | None = None
    _tokenizer: PreTrainedTokenizerFast | None = None
    _corpus: Corpus | None = None
    _logger: SafeLogger | None = None
    _whole: Session | None = None
    _cut: dict[str, Session] = field(default_factory=dict)
    _main: Session | None = None
    _of_texts: dict[str, Session] = field(default_factory=dict)

    @property
    def is_sent_models(self) -> bool:
        """Whether this process is sent its shards of the models that are trained, instead of reading them whole."""
        return self.compute.strategy == "fsdp" and self.world.rank > 0

    @property
    def awaits_rows(self) -> bool:
        """Whether a stage has still to make some of the rows of the text."""
        return any(not source.is_there() for source in made_sources(self.data))

    @property
    def is_cut(self) -> bool:
        """Whether the text is read in a part of the run's tokens."""
        return self._whole is not None

    def of_stage(self, name: str) -> Session:
        """The session of one stage: with the text that it reads, in the tokens that it reads it in."""
        return self.of_text(data_of(self.stages, self.data, name)).in_vocabulary_of(self.stages[name].vocabulary_of())

    def of_text(self, data: DataSpec) -> Session:
        """The session that reads another text."""
        data = located(data, lambda name: self.run.stage(name) / (self.stages[name].result({}) or ""))
        if data == self.data:
            return self
        key = hash_of(data.model_dump(mode="json"))
        if key not in self._of_texts:
            fresh: dict[str, Any] = {"_tokenizer": None, "_corpus": None, "_cut": {}, "_of_texts": {}}
            self._of_texts[key] = replace(self, data=data, _main=self, **fresh)
        return self._of_texts[key]

    def in_vocabulary_of(self, reference: str | None) -> Session:
        """The session in which the text is read in a model's tokens: another one where its vocabulary was cut."""
        if reference is None or reference == SELF:
            return self
        artifact = self.artifact(reference)
        lineage = artifact.lineage()
        if lineage is None or lineage.num_tokens is None:
            return self
        if artifact.location not in self._cut:
            own = load_tokenizer(artifact.location)  # with the run's chat template, as it was saved
            if self.chat_template is not None:  # of another text than the model's stage had
                own.chat_template = self.chat_template
            self._cut[artifact.location] = replace(self, _tokenizer=own, _corpus=None, _whole=self._whole or self)
        return self._cut[artifact.location]

    def artifact(self, reference: str) -> Artifact:
        """The model behind a reference of the recipe."""
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
        return stage.teacher_named() or reference if stage is not None and stage.makes_signal else reference

    @cached_property
    def data_hash(self) -> str:
        """Stands for the text and how it is cut; another text under the same name is another hash, and the same text
        under another name is not.

        Raises:
            InputError: the text is not there.
        """
        texts = [source.identity() for source in (self.data.train, self.data.validation) if source is not None]
        wanted, template = self.data.tokenizer, [] if self.chat_template is None else [self.chat_template]
        place = fingerprint(self.artifact(wanted).location) if isinstance(wanted, str) else None
        rest = self.data.model_dump(mode="json", exclude={"train", "validation"})
        # what these two name is hashed by itself
        rest["chat"] = {**(rest["chat"] or {}), "template": None}
        rest["tokenizer"] = None if place is not None else rest["tokenizer"]
        if not self.data.task.is_causal:
            rest["task"] = self.data.task.model_dump(mode="json")
        if self.data.augment is None:
            del rest["augment"]
        else:
            model = self.data.augment.replace_words.model
            rest["augment"]["replace_words"]["model"] = fingerprint(self.artifact(model).location)
        if self._main is not None and place is None:  # the tokenizer is trained on the run's text
            template.append(self._main.data_hash)
        return hash_of(rest, texts, place, RULE, *template)

    @cached_property
    def chat_template(self) -> Any:
        """The text of the template by which conversations are written; None where no stage of the run reads any.

        Raises:
            InputError: the model that the recipe names for it has none, or the file cannot be read.
        """
        return template_of(self._spoken, self.stages, lambda reference: self.artifact(reference).location)

    @property
    def chat_prompts(self) -> ChatPrompts | None:
        """What makes prompts of what a user says; None where no stage of the run reads conversations."""
        return prompts_of(self._spoken, self.chat_template)

    @property
    def _spoken(self) -> DataSpec:
        """The text whose template models are saved with: the own one, or the first of any stage with conversations."""
        return self.data if self.data.holds_conversations else spoken(self.stages, (self._main or self).data)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The one tokenizer of the run: the teacher's, another model's, or one trained on the corpus."""
        if self._tokenizer is None:
            wanted = self.data.tokenizer
            if isinstance(wanted, str):
                self._tokenizer = load_tokenizer(self.artifact(wanted).location)
            else:
                self._tokenizer = trained_tokenizer((self._main or self).data, wanted, self.run.folder / "data")
            if self.chat_template is not None:
                self._tokenizer.chat_template = self.chat_template  # models of the run are saved with it
        return self._tokenizer

    def corpus(self) -> Corpus:
        """The run's data, tokenized and packed; opened once."""
        if self._corpus is None:
            tokenizer = self.tokenizer()
            if self.gather is not None and self.data.task.is_causal and not self.data.needs_order:
                self.gather(self)
            locate = lambda reference: self.artifact(reference).location  # noqa: E731
            place = self.run.folder / "data"
            if self.data.task.is_causal:
                words = candidates_of(self.data, locate, self.compute)
                self._corpus = Corpus.open(self.data, tokenizer, place, self.seed, len(tokenizer), words, self.world)
            else:
                self._corpus = open_rows(self.data, tokenizer, place, self.seed, len(tokenizer))
            for line in [*self._corpus.summary().splitlines(), *self._other_templates()]:
                self.say(f"  {line}")
        return self._corpus

    def _other_templates(self) -> list[str]:
        if not self.data.holds_conversations or self.is_cut:
            return []
        locate = lambda reference: self.artifact(reference).location  # noqa: E731
        return other_templates(self.tokenizer(), self.data, self.stages, locate, self.teacher)

    def logger(self) -> SafeLogger | None:
        """The W&B run that all stages log to, opened once; its id stays with the run folder, so that curves go on.

        None when it is off, and in all processes but the first.
        """
        from distill.tracking.wandb import make_logger

        if (owner := self._whole or self._main) is not None:
            return owner.logger()
        if self._logger is None and self.logging.wandb != "disabled" and self.world.rank == 0:
            file = self.run.folder / "wandb-id"
            if not file.is_file():
                write_text(file, trial_of_sweep() or uuid.uuid4().hex[:8])
            config, run_id = yaml.safe_load(self.text), read(file).decode("utf-8", "replace")
            self._logger = make_logger(self.logging, self.run.folder, run_id, self.recipe, config)
        return self._logger

    def close(self) -> None:
        """Close what is open; says how to send an offline W&B run."""
        if self._logger is not None:
            from distill.tracking.wandb import finish

            if line := finish(self._logger):
                self.say(f"W&B is offline; to send this run: {line}")


class RankDone(Exception):
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
        parent: str,
        teacher: str | None,
        figures: dict[str, Any],
        mask: str | None = None,
        tokenizer: PreTrainedTokenizerFast | None = None,
    ) -> Artifact:
        """Write the stage's model folder, whole or not at all, with tokenizer and lineage, and read it back.

        Args:
            save: writes weights and config into the folder it is given, and compares them with the model.
            parent: reference of the model that this one was made from.
            teacher: reference of the model that it learned from.
            figures: go into the lineage.
            mask: see :class:`~distill.core.artifact.Lineage`.
            tokenizer: with the vocabulary cut; None is that of the session.
        """
        artifact = self.session.run.model(self.name)
        above = self.session.artifact(parent)
        line = above.lineage()
        with replacing(Path(artifact.location)) as folder:
            save(folder)
            written = tokenizer or self.session.tokenizer()
            written.save_pretrained(folder)
            check_written(folder, written)
            write_lineage(
                folder,
                Lineage(
                    stage=self.name,
                    kind=self.session.stages[self.name].kind,
                    parent=parent,
                    teacher=teacher,
                    base_model=line.base_model if line else self._base_model(parent),
                    licence=line.licence if line else licence_of(above.location, self.say),
                    input_hash=self.input_hash,
                    figures=figures,
                    mask=mask,
                    num_tokens=len(written) if tokenizer is not None or self.session.is_cut else None,
                ),
            )
        return artifact

    def _base_model(self, parent: str) -> str:
        return str(self.session.teacher) if parent == "teacher" else parent
