"""The end of a stage, tried before its start: what would fail after hours of training fails in seconds.

A model's folder is written as it will be, but for the weights, and read back; a plot is drawn. What a stage tries is
said by its :meth:`~distill.stages.base.StageSpec.rehearse`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub.errors import StrictDataclassError
from transformers import PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from distill.core.artifact import Lineage, replacing, write_lineage
from distill.core.errors import DistillError, InputError, MachineError
from distill.core.outside import is_folder
from distill.core.run_folder import CHECKPOINTS
from distill.data.tokenizer import check_written, load_tokenizer
from distill.exporters.base import ExporterSpec
from distill.models.load import empty_model, load_config, low_bit_scheme, task_of
from distill.models.new import NewModel
from distill.pretrained import generation_config_from
from distill.quantization.fake_quant import fake_quant_layers
from distill.reporting.plots import render
from distill.stages.base import SELF
from distill.stages.models import check_vocabulary, config_of_new
from distill.stages.session import StageContext
from distill.stages.synthesize.writer_spec import ServerSpec
from distill.stages.synthesize.writer_tokenizer import writer_tokenizer

if TYPE_CHECKING:
    pass

REFUSALS = (ValueError, TypeError, AttributeError, KeyError, RuntimeError, StrictDataclassError)
"""What transformers raises for a model that it does not save."""


@contextmanager
def trial_folder(context: StageContext) -> Iterator[Path]:
    """A folder whose place and name are as long as the model's will be while it is written, gone after the block.

    Raises:
        MachineError: it cannot be written.
    """
    place = context.session.run.folder / f".{context.name}.writing"
    try:
        with replacing(place / "model") as folder:
            yield folder
    finally:
        shutil.rmtree(place, ignore_errors=True)


def rehearse_model(context: StageContext, source: str | NewModel) -> None:
    """Write the stage's model folder but for the weights, and read it back.

    Args:
        context: of the stage.
        source: reference of the model that the stage's is made from, or a new one. The model at the root of its line
            stands for one that has not been made yet.

    Raises:
        InputError: transformers would not save the model or its tokenizer, or read another one back.
        MachineError: the run folder cannot be written.
    """
    location, what = None, "a new model"
    if isinstance(source, str):
        location = standing_for(context, source)
        if location is None:
            return  # its own stage rehearses the new model
        what, config = location, load_config(location)
    else:
        config = config_of_new(context, source)
    task = context.session.data.task
    if task_of(config) == "causal_lm" and task.is_causal:  # else the stage refuses it
        with trial_folder(context) as folder:
            _write(context, _empty(config, location), folder, what)
    elif not task.is_causal and task_of(config) != "causal_lm":
        with trial_folder(context) as folder:
            _write(context, empty_model(config, task.head), folder, what)


def standing_for(context: StageContext, reference: str) -> str | None:
    """Where a model is, or the nearest one there is of those that it will be made from; None when that is a new one."""
    session, line = context.session, reference
    while line in session.stages and session.run.done(line) is None:
        above = session.stages[line].vocabulary_of()
        if above is None:
            return None
        line = session.teacher_behind(above)
    return session.artifact(line).location


def _empty(config: PretrainedConfig, location: str | None) -> PreTrainedModel:
    """The model without weights."""
    if low_bit_scheme(config):
        del config.quantization_config  # its weights are widened when it is loaded
    model = empty_model(config)
    if location is not None and (generation := generation_config_from(location)) is not None:
        model.generation_config = generation
    return model


def _write(context: StageContext, model: PreTrainedModel, folder: Path, what: str) -> None:
    tokenizer = context.session.tokenizer()
    try:
        model.save_pretrained(folder, state_dict={})
        revert_weight_conversion(model, model.state_dict())  # the names that the weights will have
        tokenizer.save_pretrained(folder)
        write_lineage(folder, Lineage(context.name, "", what, None, what, None, context.input_hash))
        load_config(str(folder))
        check_written(folder, tokenizer)
    except MachineError:
        raise
    except (DistillError, *REFUSALS) as error:
        why = " ".join(str(error).replace(f"{folder}: ", "").split()) or type(error).__name__
        raise InputError(f"{what}: a model made from it could not be saved in the end: {why}") from error


def check_outside(context: StageContext, *references: str, tokens: bool = True) -> None:
    """Compare the tokens of models that no stage makes with those of the run.

    Args:
        context: of the stage.
        references: of the models that the stage reads; those of stages, and of a cut vocabulary, are left out.
        tokens: whether to compare their tokenizers too; see :func:`distill.stages.models.check_vocabulary`.

    Raises:
        InputError: a model does not load, or speaks another vocabulary.
    """
    session = context.session
    for reference in dict.fromkeys(references):
        is_outside = reference not in session.stages and reference != SELF
        if is_outside and not session.is_cut and session.in_vocabulary_of(reference) is session:
            check_vocabulary(context, session.artifact(reference).location, tokens=tokens)


def check_writer(context: StageContext, writer: object) -> None:
    """Read config and tokenizer of a model from outside that writes, in whatever tokens; of a server the key.

    Args:
        context: of the stage.
        writer: its reference, or a server; None is left out, and so are models that stages make.

    Raises:
        InputError: it cannot be read, or has no chat template; the environment has no key.
    """
    if isinstance(writer, ServerSpec):
        writer.key()
    elif isinstance(writer, str) and writer not in context.session.stages:
        load_config(context.session.artifact(writer).location)
        writer_tokenizer(context.session, writer)


def check_target(context: StageContext, reference: str, target: ExporterSpec) -> None:
    """Compare an export's format with the model, or the nearest one there is of those that it will be made from.

    Raises:
        InputError: its architecture, its tokenizer or its files cannot be written so.
    """
    location = standing_for(context, reference)
    if location is None:
        target.check_model("a new model", None, context.session.tokenizer())
    else:
        target.check_model(location, load_config(location), load_tokenizer(location))
    if reference not in context.session.stages and location is not None and is_folder(location):
        target.check_files(Path(location))


def check_prompts(context: StageContext, prompts: Iterable[str]) -> None:
    """Refuse a prompt from which no model can go on.

    Raises:
        InputError: the run's tokenizer makes no token of it.
    """
    if context.session.chat_prompts is not None:  # the template's own words stand around it
        return
    tokenizer = context.session.tokenizer()
    for prompt in prompts:
        if not tokenizer(prompt)["input_ids"]:
            raise InputError(f"prompts: {prompt!r} has no tokens; give a text of at least one token")


def rehearse_plots(names: Iterable[str] = ()) -> None:
    """Draw a plot, and in it the names that later ones will show.

    Raises:
        MachineError: nothing can be drawn here.
    """
    shown = "\n".join(names)
    try:
        render("trial", (2.0, 2.0), lambda axes: axes.set_title(shown))
    except (OSError, ImportError, ValueError, RuntimeError) as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise MachineError(f"plots cannot be drawn here ({why}); is matplotlib whole?") from error


def check_room(context: StageContext, model: PreTrainedModel) -> None:
    """Refuse a disk that will be full when training ends: the last checkpoint and the model have to be there at once.

    Args:
        context: of the stage.
        model: in fp32, before training.

    Raises:
        MachineError: not even the least that both can take is free.
    """
    num_bytes = 2 if context.session.compute.precision == "bf16-true" else 4
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    checkpoint = 3 * num_bytes * trained  # weights, and both moments of the optimizer
    # a weight has 16 bits in a plain model at least, 1 in a low-bit one
    stored = sum(p.numel() for p in model.parameters()) * (1 / 8 if fake_quant_layers(model) else 2)
    held = any((context.folder / CHECKPOINTS).glob("step=*.ckpt"))  # it is replaced, but not before the next is there
    needed, free = max(checkpoint, stored) if held else checkpoint + stored, shutil.disk_usage(context.folder).free
    if needed > free:
        raise MachineError(
            f"{context.folder}: the last checkpoint ({checkpoint / 1e9:,.2f} GB) and the model ({stored / 1e9:,.2f} GB "
            f"at least) have no room in the {free / 1e9:,.2f} GB that are free; make room, or choose another --run-dir"
        )
