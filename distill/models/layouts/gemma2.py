"""Gemma 2: norms before and after attention and MLP, soft-capped scores, a sliding window in every other layer.

Norms multiply by one plus their weight. The model multiplies embeddings by sqrt(hidden size), so embedding weights are
rescaled by sqrt(d / d') to keep the residual stream unchanged. With tied weights this rescales the head as well. The
last norm should be rescaled by the same factor, so there it is left unchanged instead.
"""

from distill.models.layouts.parts import HIDDEN, LAYER, attention, decoder, gated_mlp, rms_norm
from distill.pruning.layout import Parameter

NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
SANDWICH = [rms_norm(f"{LAYER}.{name}", one_plus=True) for name in NORMS]
ENDS = [
    Parameter("model.embed_tokens.weight", ("vocabulary", HIDDEN), rescaled="weight"),
    Parameter("model.norm.weight", (HIDDEN,), only_if="tie_word_embeddings"),
    Parameter("model.norm.weight", (HIDDEN,), unless="tie_word_embeddings", rescaled="one_plus_weight"),
    Parameter("lm_head.weight", ("vocabulary", HIDDEN), unless="tie_word_embeddings"),
]
LAYOUT = decoder(
    "gemma2",
    [*SANDWICH, *attention(qkv_bias="attention_bias", out_bias="attention_bias"), *gated_mlp()],
    of=ENDS,
    hidden_rule="multiple_of_heads",
)
