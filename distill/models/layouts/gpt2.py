"""GPT-2: pre-norm decoder with LayerNorm, learned positions, and weights stored as [inputs, outputs] (Conv1D)."""

from distill.models.layouts.parts import HEADS, HIDDEN, NEURONS, layer_norm
from distill.pruning.layout import Dimension, Layout, Parameter

LAYER = "transformer.h.{layer}"


def conv1d(path: str, inputs: Dimension, outputs: Dimension) -> list[Parameter]:
    """Weight and bias of a Conv1D, a linear layer whose weight is transposed."""
    return [Parameter(f"{path}.weight", (inputs, outputs)), Parameter(f"{path}.bias", (outputs,))]


LAYOUT = Layout(
    model_type="gpt2",
    parameters=(
        Parameter("transformer.wte.weight", ("vocabulary", HIDDEN)),
        Parameter("transformer.wpe.weight", ("positions", HIDDEN)),
        *layer_norm(f"{LAYER}.ln_1"),
        *conv1d(f"{LAYER}.attn.c_attn", HIDDEN, (HEADS, HEADS, HEADS)),
        *conv1d(f"{LAYER}.attn.c_proj", HEADS, HIDDEN),
        *layer_norm(f"{LAYER}.ln_2"),
        *conv1d(f"{LAYER}.mlp.c_fc", HIDDEN, NEURONS),
        *conv1d(f"{LAYER}.mlp.c_proj", NEURONS, HIDDEN),
        *layer_norm("transformer.ln_f"),
        Parameter("lm_head.weight", ("vocabulary", HIDDEN), unless="tie_word_embeddings"),
    ),
    size_keys={
        HIDDEN: "n_embd",
        NEURONS: "n_inner",
        HEADS: "n_head",
        "layers": "n_layer",
        "vocabulary": "vocab_size",
        "positions": "n_positions",
    },
    body="transformer",
    block=LAYER,
    reads=(f"{LAYER}.attn", f"{LAYER}.mlp"),
    attention_out=f"{LAYER}.attn.c_proj",
    mlp_down=f"{LAYER}.mlp.c_proj",
    norm_eps_key="layer_norm_epsilon",
    hidden_rule="heads_times_head_dim",
    neurons_per_channel=4,
    expects={"add_cross_attention": False, "scale_attn_by_inverse_layer_idx": False},
)
