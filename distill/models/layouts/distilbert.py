"""DistilBERT: BERT without token types; the class fixes epsilon at 1e-12."""

from distill.core.tasks import Head
from distill.models.layouts.bert import TIED
from distill.models.layouts.parts import HEADS, HIDDEN, NEURONS, layer_norm, linear
from distill.pruning.layout import Layout, Parameter


def distilbert(body: str, head: list[Parameter], task: Head) -> Layout:
    """The layout with a head; ``body`` is "" for a model without one."""
    prefix = f"{body}." if body else ""
    layer = f"{prefix}transformer.layer.{{layer}}"
    return Layout(
        model_type="distilbert",
        parameters=(
            Parameter(f"{prefix}embeddings.word_embeddings.weight", ("vocabulary", HIDDEN)),
            Parameter(f"{prefix}embeddings.position_embeddings.weight", ("positions", HIDDEN)),
            *layer_norm(f"{prefix}embeddings.LayerNorm"),
            *(
                row
                for name in ("q_lin", "k_lin", "v_lin")
                for row in linear(f"{layer}.attention.{name}", HEADS, HIDDEN)
            ),
            *linear(f"{layer}.attention.out_lin", HIDDEN, HEADS),
            *layer_norm(f"{layer}.sa_layer_norm"),
            *linear(f"{layer}.ffn.lin1", NEURONS, HIDDEN),
            *linear(f"{layer}.ffn.lin2", HIDDEN, NEURONS),
            *layer_norm(f"{layer}.output_layer_norm"),
            *head,
        ),
        size_keys={
            HIDDEN: "dim",
            NEURONS: "hidden_dim",
            HEADS: "n_heads",
            "layers": "n_layers",
            "vocabulary": "vocab_size",
            "positions": "max_position_embeddings",
        },
        body=body,
        embeddings=f"{prefix}embeddings",
        block=layer,
        reads=(f"{layer}.attention", f"{layer}.ffn"),
        attention_out=f"{layer}.attention.out_lin",
        mlp_down=f"{layer}.ffn.lin2",
        projections={part: f"{layer}.attention.{part[0]}_lin" for part in ("queries", "keys", "values")},
        norm_eps_key=None,
        hidden_rule="heads_times_head_dim",
        task=task,
    )


LAYOUT = distilbert(
    "distilbert",
    [
        *linear("vocab_transform", HIDDEN, HIDDEN),
        *layer_norm("vocab_layer_norm"),
        Parameter("vocab_projector.weight", ("vocabulary", HIDDEN), unless=TIED),
        Parameter("vocab_projector.bias", ("vocabulary",)),
    ],
    "masked_lm",
)
OTHER_HEADS = (
    distilbert(
        "distilbert",
        [*linear("pre_classifier", HIDDEN, HIDDEN), *linear("classifier", "classes", HIDDEN)],
        "classification",
    ),
    distilbert("distilbert", [*linear("classifier", "classes", HIDDEN)], "token_classification"),
    distilbert("", [], "embedding"),
)
