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


ENCODERS = frozenset((
    "albert", "bart", "bert", "big_bird", "camembert", "convbert", "data2vec-text", "deberta", "deberta-v2",
    "distilbert", "electra", "ernie", "esm", "esmc", "eurobert", "flaubert", "fnet", "funnel", "gte", "ibert",
    "jina_embeddings_v3", "layoutlm", "longformer", "luke", "mbart", "megatron-bert", "mobilebert", "modernbert",
    "modernvbert", "mpnet", "mra", "mvp", "neomme", "nomic_bert", "nystromformer", "perceiver", "reformer",
    "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "squeezebert", "tapas", "ultrabert",
    "ultravbert", "xlm", "xlm-roberta", "xlm-roberta-xl", "xmod", "yoso",
))  # fmt: skip
"""``model_type`` of the architectures that transformers loads with a head for masked tokens."""


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


def task_in(config: Mapping[str, Any]) -> Head:
    """As :func:`task_of`, from ``config.to_dict()`` or a parsed ``config.json``."""
    head = named_head(config)
    if head in ("classification", "token_classification"):
        return head
    if config.get("model_type") not in ENCODERS or config.get("is_decoder"):
        return "causal_lm"
    return "embedding" if head == "embedding" else "masked_lm"


def task_of(config: PretrainedConfig) -> Head:
    """The task of a model. Without this, transformers would load an encoder as a causal model without a causal mask."""
    return task_in({key: getattr(config, key, None) for key in ("architectures", "model_type", "is_decoder")})


def auto_class(head: Head) -> str:
    """Name of the class of transformers that loads a model with this head."""
    return "AutoModel" if head == "embedding" else f"AutoModel{CLASS_OF[head]}"


def loader_of(head: Head) -> Any:
    """The class that :func:`auto_class` names."""
    import transformers

    return getattr(transformers, auto_class(head))


def head_of(model: Any) -> Head:
    """The head of a model in memory, by its class; a class of an unknown name counts as a causal language model."""
    return named_head({"architectures": [type(model).__name__]}) or "causal_lm"
