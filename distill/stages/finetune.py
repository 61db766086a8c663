"""Cross-entropy training of any causal model: a teacher corrected, a control without a teacher, a new small teacher."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from distill.core.model_config import check_config
from distill.models.configs import AT_MOST
from distill.models.lora import LoraSpec
from distill.models.new import NewModel
from distill.pruning.layout import Config
from distill.stages.ask_every import AskEvery, check_asked
from distill.stages.base import View
from distill.stages.checks import check_sizes, check_task, refuse_task
from distill.stages.forecast import Forecast, Training
from distill.stages.heads import with_task
from distill.stages.passes import say_passes
from distill.stages.text import ReadsText
from distill.training.spec import BudgetSpec
from distill.training.task_losses import losses_on_text

if TYPE_CHECKING:
    from distill.stages.session import StageContext


class Finetune(BudgetSpec, ReadsText):
    """Train a model on the text itself (cross-entropy), without a teacher."""

    makes_model: ClassVar[bool] = True

    kind: Literal["finetune"] = "finetune"
    model: str | NewModel
    """Model to train: "teacher", an earlier stage, a folder, a Hub id, or {config: ...} for a new model."""
    weights: Literal["pretrained", "random"] = "pretrained"
    """random: keep the architecture and initialise the weights randomly (a control)."""
    lora: LoraSpec | None = None
    """Train LoRA adapters instead of the weights; unset is off."""
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the stored weights; auto is that of the model before training (float32 for a new model)."""
    evaluate_every: AskEvery | None = None
    """Evaluate tasks during training, {num_steps: 200, tasks: {...}}, for curves of accuracy in addition to the loss;
    unset is off."""

    def references(self) -> list[tuple[tuple[str | int, ...], str]]:
        """The model that is trained."""
        return [(("model",), self.model)] if isinstance(self.model, str) else []

    def same_tokens(self) -> list[tuple[tuple[str | int, ...], str]]:
        """The model, unless its weights are forgotten; then it may learn any."""
        return [] if self.weights == "random" else self.references()

    def forecast(self, view: View) -> Forecast:
        """A model of the same shape, trained on the text."""
        if isinstance(self.model, str):
            forecast = with_task(view.of_model(self.model, self._check), view)
        else:
            check_config(self.model.config, "model.config")
            forecast = with_task(self._new(view, self.model.config), view)
            self._check(view, forecast.makes[0])
        return replace(
            forecast,
            reads=self.reading(),
            does=self.in_words(view.data.sequence_length, view.data.packing),
            training=Training(self, losses_on_text(view.data.task), lora=self.lora),
        )

    def _new(self, view: View, config: Config) -> Forecast:
        """A new model; its tokens are those of the run's tokenizer, where its config does not say."""
        if "vocab_size" in config:
            return Forecast(makes=[dict(config)], grids=())
        tokens = view.vocabulary()
        known = {} if tokens is None else {"vocab_size": tokens}
        return Forecast(makes=[{**known, AT_MOST: True, **config}], grids=(), is_open=True)

    def _check(self, view: View, config: Config | None) -> None:
        check_sizes(self, view, config)
        check_task(self, view, starts=["model"])
        if self.lora is not None:
            refuse_task(view, "lora")
        if self.evaluate_every is not None:
            refuse_task(view, "evaluate_every")
        check_asked(self.evaluate_every, view)

    def rehearse(self, context: StageContext) -> None:
        """Compare the model's tokens with the run's; write a model folder without weights."""
        from distill.stages.rehearsal import check_outside, rehearse_model

        if isinstance(self.model, str):
            check_outside(context, self.model, tokens=self.weights == "pretrained")
        if self.evaluate_every is not None:
            self.evaluate_every.rehearse(context)
        rehearse_model(context, self.model)
        say_passes(context, self)

    def run(self, context: StageContext) -> dict[str, Any]:
        """Train, then write the model."""
        from distill.stages.train import train_and_write

        return train_and_write(
            context,
            self,
            self.model,
            losses_on_text(context.session.data.task),
            weights=self.weights,
            lora=self.lora,
            save_dtype=self.save_dtype,
            evaluate_every=self.evaluate_every,
        )
