"""BERT: post-norm encoder with LayerNorm and learned positions; with a head for masked tokens, for classes, or none."""

from distill.core.tasks import Head
from distill.models.layouts.parts import HEADS, HIDDEN, NEURONS, SIZE_KEYS, layer_norm, linear
from distill.pruning.layout import Layout, Parameter

TIED = "tie_word_embeddings"
ENCODER_SIZE_KEYS = {
    **{axis: key for axis, key in SIZE_KEYS.items() if axis not in ("kv_groups", "head_dim")},
    "positions": "max_position_embeddings",
    "token_types": "type_vocab_size",
}


def encoder(
    model_type: str, body: str, head: list[Parameter], pinned_tokens: tuple[str, ...] = (), task: Head = "masked_lm"
) -> Layout:
    """The layout of an encoder with BERT's names, in a body of this name; "" is a model without a head."""
    prefix = f"{body}." if body else ""
    layer = f"{prefix}encoder.layer.{{layer}}"
    return Layout(
        model_type=model_type,
        parameters=(
            Parameter(f"{prefix}embeddings.word_embeddings.weight", ("vocabulary", HIDDEN)),
            Parameter(f"{prefix}embeddings.position_embeddings.weight", ("positions", HIDDEN)),
            Parameter(f"{prefix}embeddings.token_type_embeddings.weight", ("token_types", HIDDEN)),
            *layer_norm(f"{prefix}embeddings.LayerNorm"),
            *(
                row
                for name in ("query", "key", "value")
                for row in linear(f"{layer}.attention.self.{name}", HEADS, HIDDEN)
            ),
            *linear(f"{layer}.attention.output.dense", HIDDEN, HEADS),
            *layer_norm(f"{layer}.attention.output.LayerNorm"),
            *linear(f"{layer}.intermediate.dense", NEURONS, HIDDEN),
            *linear(f"{layer}.output.dense", HIDDEN, NEURONS),
            *layer_norm(f"{layer}.output.LayerNorm"),
            *head,
        ),
        size_keys=ENCODER_SIZE_KEYS,
        body=body,
        embeddings=f"{prefix}embeddings",
        block=layer,
        reads=(f"{layer}.attention", f"{layer}.intermediate"),
        attention_out=f"{layer}.attention.output.dense",
        mlp_down=f"{layer}.output.dense",
        projections={
            "queries": f"{layer}.attention.self.query",
            "keys": f"{layer}.attention.self.key",
            "values": f"{layer}.attention.self.value",
        },
        norm_eps_key="layer_norm_eps",
        hidden_rule="heads_times_head_dim",
        expects={"is_decoder": False, "add_cross_attention": False},
        pinned_tokens=pinned_tokens,
        task=task,
    )


LAYOUT = encoder(
    "bert",
    "bert",
    [
        *linear("cls.predictions.transform.dense", HIDDEN, HIDDEN),
        *layer_norm("cls.predictions.transform.LayerNorm"),
        Parameter("cls.predictions.bias", ("vocabulary",)),
        Parameter("cls.predictions.decoder.weight", ("vocabulary", HIDDEN), unless=TIED),
        Parameter("cls.predictions.decoder.bias", ("vocabulary",), unless=TIED),
    ],
)
OTHER_HEADS = (
    encoder(
        "bert",
        "bert",
        [*linear("bert.pooler.dense", HIDDEN, HIDDEN), *linear("classifier", "classes", HIDDEN)],
        task="classification",
    ),
    encoder("bert", "bert", [*linear("classifier", "classes", HIDDEN)], task="token_classification"),
    encoder("bert", "", [*linear("pooler.dense", HIDDEN, HIDDEN)], task="embedding"),
)
