"""Which head a model has, by the name of its class; nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from distill.core.tasks import Head

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SUFFIXES: Mapping[str, Head] = {
    "ForCausalLM": "causal_lm",
    "LMHeadModel": "causal_lm",
    "ForConditionalGeneration": "causal_lm",
    "ForMaskedLM": "masked_lm",
    "ForPreTraining": "masked_lm",
    "ForSequenceClassification": "classification",
    "ForTokenClassification": "token_classification",
}
"""Ends of the names of classes in transformers -> their head."""
BODY = "Model"
"""End of the name of a class without a head."""
CLASS_OF: Mapping[Head, str] = {
    "causal_lm": "ForCausalLM",
    "masked_lm": "ForMaskedLM",
    "classification": "ForSequenceClassification",
    "token_classification": "ForTokenClassification",
    "embedding": BODY,
}
"""Head -> the end of the name of its class."""


HUB_TASKS: Mapping[Head, str] = {
    "causal_lm": "text-generation",
    "masked_lm": "fill-mask",
    "classification": "text-classification",
    "token_classification": "token-classification",
    "embedding": "sentence-similarity",
}
"""Head -> the name of its task on the Hub."""


def named_head(config: Mapping[str, Any]) -> Head | None:
    """The head that a config names; None if it names no class, or one that is not known here.

    Args:
        config: ``config.to_dict()`` or a parsed ``config.json``.
    """
    for name in config.get("architectures") or ():
        for suffix, head in SUFFIXES.items():
            if str(name).endswith(suffix):
                return head
        if str(name).endswith(BODY):
            return "embedding"
    return None


def with_head(config: Mapping[str, Any], head: Head, num_classes: int | None = None) -> dict[str, Any]:
    """A config as of the same model with another head, for forecasts.

    Args:
        config: of a model.
        head: the new one.
        num_classes: of a head for classes; None: not known yet.
    """
    made = {**config, "architectures": [f"Encoder{CLASS_OF[head]}"]}
    if num_classes is not None:
        made["id2label"] = {str(at): f"LABEL_{at}" for at in range(num_classes)}
    return made


def task_of(config: PretrainedConfig) -> Head:
    """The task of a model. Without this, transformers would load an encoder as a causal model without a causal mask."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    head = named_head({"architectures": config.architectures})
    if head in ("classification", "token_classification"):
        return head
    is_encoder = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    if not is_encoder:
        return "causal_lm"
    return "embedding" if head == "embedding" else "masked_lm"


def loader_of(task: Head) -> Any:
    """The class of transformers that loads a model with this head."""
    import transformers

    names = {
        "masked_lm": "AutoModelForMaskedLM",
        "classification": "AutoModelForSequenceClassification",
        "token_classification": "AutoModelForTokenClassification",
        "embedding": "AutoModel",
    }
    return getattr(transformers, names.get(task, "AutoModelForCausalLM"))


def head_of(model: Any) -> Head:
    """The head of a model in memory, by its class; a class of an unknown name counts as a causal language model."""
    return named_head({"architectures": [type(model).__name__]}) or "causal_lm"
