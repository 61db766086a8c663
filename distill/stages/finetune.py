"""Cross-entropy training of any causal model: a teacher corrected, a control without a teacher, a new small teacher."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from distill.core.errors import InputError
from distill.core.spec import Spec
from distill.losses import CrossEntropy
from distill.models.lora import LoraSpec
from distill.stages.base import StageContext, StageSpec
from distill.training.spec import BudgetSpec


class NewModel(Spec):
    """A model that does not exist yet, from a config of transformers."""

    config: dict[str, Any]
    """``model_type`` and the keys of its config; vocab_size comes from the tokenizer if it is not given."""


class Finetune(BudgetSpec, StageSpec):
    """Train a model on the text itself (cross-entropy), without a teacher."""

    makes_model: ClassVar[bool] = True

    kind: Literal["finetune"] = "finetune"
    model: str | NewModel
    """What to train: "teacher", an earlier stage, a folder, a Hub id, or {config: ...} for a new model."""
    weights: Literal["pretrained", "random"] = "pretrained"
    """random: keep the architecture, forget the weights (a control)."""
    lora: LoraSpec | None = None
    """Train adapters instead of the weights; unset is off."""
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the stored weights; auto is that of the model it starts from (float32 for a new one)."""

    def references(self) -> list[tuple[tuple[str | int, ...], str]]:
        """The model that is trained."""
        return [(("model",), self.model)] if isinstance(self.model, str) else []

    def run(self, context: StageContext) -> dict[str, Any]:
        """Train, then write the model."""
        from distill.stages.train import hold_mask, save_plain, stored_dtype_of, train
        from distill.training.assemble import assemble, disassemble

        start = starting_model(context, self.model, self.weights)
        location = context.session.artifact(self.model).location if isinstance(self.model, str) else None
        dtype = stored_dtype_of(location, self.save_dtype) if location else self.save_dtype.replace("auto", "float32")
        mask = None
        if isinstance(self.model, str) and self.weights == "pretrained":
            mask = hold_mask(context, self.model, start, lora=self.lora is not None)
        student = assemble(start, lora=self.lora, gradient_checkpointing=context.session.compute.gradient_checkpointing)
        figures = train(context, student, [CrossEntropy()], self, teacher=None)
        parent = self.model if isinstance(self.model, str) else "a new model"
        context.write_model(
            save_plain(disassemble(student), dtype),
            kind=self.kind,
            parent=parent,
            teacher=None,
            figures=figures,
            mask=mask,
        )
        return figures


def starting_model(context: StageContext, reference: str | NewModel, weights: str) -> Any:
    """The model that training starts from, in fp32: loaded, of the same shape with random weights, or new.

    In a process that is sent its shares later it has no numbers yet.

    Raises:
        InputError: it cannot be loaded or built, or is too small for the tokenizer.
    """
    from distill.data.tokenizer import check_read_back
    from distill.models.load import empty_model, load_config, new_config, new_model
    from distill.stages.train import check_speaks, load_trainable

    session = context.session
    if isinstance(reference, NewModel):
        tokenizer = session.tokenizer()
        tokens = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        known = {"vocab_size": len(tokenizer)} | {k: v for k, v in tokens.items() if v is not None}
        config = new_config(known | reference.config)
        if config.get_text_config().vocab_size < len(tokenizer):
            raise InputError(
                f"config.vocab_size ({config.vocab_size}) is less than the tokenizer's {len(tokenizer)} tokens"
            )
        check_read_back(tokenizer, config.model_type)
        return empty_model(config) if session.is_sent_models else new_model(config, seed=session.seed)
    location = session.artifact(reference).location
    check_speaks(context, location, tokens=weights == "pretrained")
    if weights == "random":
        config = load_config(location)
        check_read_back(session.tokenizer(), config.model_type)
        return empty_model(config) if session.is_sent_models else new_model(config, seed=session.seed)
    return load_trainable(context, location)
