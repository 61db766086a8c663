"""DistilBERT with its masked-language-modelling head: BERT without token types; the class fixes epsilon at 1e-12."""

from distill.models.layouts.bert import TIED
from distill.models.layouts.parts import HEADS, HIDDEN, NEURONS, layer_norm, linear
from distill.pruning.layout import Layout, Parameter

LAYER = "distilbert.transformer.layer.{layer}"

LAYOUT = Layout(
    model_type="distilbert",
    parameters=(
        Parameter("distilbert.embeddings.word_embeddings.weight", ("vocabulary", HIDDEN)),
        Parameter("distilbert.embeddings.position_embeddings.weight", ("positions", HIDDEN)),
        *layer_norm("distilbert.embeddings.LayerNorm"),
        *(row for name in ("q_lin", "k_lin", "v_lin") for row in linear(f"{LAYER}.attention.{name}", HEADS, HIDDEN)),
        *linear(f"{LAYER}.attention.out_lin", HIDDEN, HEADS),
        *layer_norm(f"{LAYER}.sa_layer_norm"),
        *linear(f"{LAYER}.ffn.lin1", NEURONS, HIDDEN),
        *linear(f"{LAYER}.ffn.lin2", HIDDEN, NEURONS),
        *layer_norm(f"{LAYER}.output_layer_norm"),
        *linear("vocab_transform", HIDDEN, HIDDEN),
        *layer_norm("vocab_layer_norm"),
        Parameter("vocab_projector.weight", ("vocabulary", HIDDEN), unless=TIED),
        Parameter("vocab_projector.bias", ("vocabulary",)),
    ),
    size_keys={
        HIDDEN: "dim",
        NEURONS: "hidden_dim",
        HEADS: "n_heads",
        "layers": "n_layers",
        "vocabulary": "vocab_size",
        "positions": "max_position_embeddings",
    },
    body="distilbert",
    block=LAYER,
    reads=(f"{LAYER}.attention", f"{LAYER}.ffn"),
    attention_out=f"{LAYER}.attention.out_lin",
    mlp_down=f"{LAYER}.ffn.lin2",
    projections={part: f"{LAYER}.attention.{part[0]}_lin" for part in ("queries", "keys", "values")},
    norm_eps_key=None,
    hidden_rule="heads_times_head_dim",
    task="masked_lm",
)
