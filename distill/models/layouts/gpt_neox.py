"""GPT-NeoX and Pythia: LayerNorm, rotary positions on part of each head, one projection with q, k and v per head."""

from distill.models.layouts.parts import HEADS, HIDDEN, NEURONS, SIZE_KEYS, layer_norm, linear
from distill.pruning.layout import Layout, Parameter

LAYER = "gpt_neox.layers.{layer}"

LAYOUT = Layout(
    model_type="gpt_neox",
    parameters=(
        Parameter("gpt_neox.embed_in.weight", ("vocabulary", HIDDEN)),
        *layer_norm(f"{LAYER}.input_layernorm"),
        *layer_norm(f"{LAYER}.post_attention_layernorm"),
        *linear(f"{LAYER}.attention.query_key_value", "qkv_heads", HIDDEN, bias="attention_bias"),
        *linear(f"{LAYER}.attention.dense", HIDDEN, HEADS, bias="attention_bias"),
        *linear(f"{LAYER}.mlp.dense_h_to_4h", NEURONS, HIDDEN),
        *linear(f"{LAYER}.mlp.dense_4h_to_h", HIDDEN, NEURONS),
        *layer_norm("gpt_neox.final_layer_norm"),
        Parameter("lm_head.weight", ("vocabulary", HIDDEN), unless="tie_word_embeddings"),
    ),
    size_keys={axis: key for axis, key in SIZE_KEYS.items() if axis not in ("kv_groups", "head_dim")},
    body="gpt_neox",
    block=LAYER,
    reads=(f"{LAYER}.attention.query_key_value", f"{LAYER}.mlp"),
    attention_out=f"{LAYER}.attention.dense",
    mlp_down=f"{LAYER}.mlp.dense_4h_to_h",
    norm_eps_key="layer_norm_eps",
    hidden_rule="heads_times_head_dim",
)
