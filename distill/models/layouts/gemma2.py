"""Gemma 2: norms before and behind attention and MLP, soft-capped scores, every other layer within a sliding window.

Its norms multiply by one plus their weight. Its embeddings are multiplied by sqrt(hidden size), so their weights grow
by sqrt(d / d') to give the stream what it had; a tied head grows along, which the last norm, left as it is, makes up
for: it would have grown by the same factor.
"""

from distill.models.layouts.parts import HIDDEN, LAYER, attention, decoder, gated_mlp, rms_norm
from distill.pruning.layout import Parameter

NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
SANDWICH = [rms_norm(f"{LAYER}.{name}", one_plus=True) for name in NORMS]
ENDS = [
    Parameter("model.embed_tokens.weight", ("vocabulary", HIDDEN), grows="weight"),
    Parameter("model.norm.weight", (HIDDEN,), only_if="tie_word_embeddings"),
    Parameter("model.norm.weight", (HIDDEN,), unless="tie_word_embeddings", grows="one_plus_weight"),
    Parameter("lm_head.weight", ("vocabulary", HIDDEN), unless="tie_word_embeddings"),
]
LAYOUT = decoder(
    "gemma2",
    [*SANDWICH, *attention(qkv_bias="attention_bias", out_bias="attention_bias"), *gated_mlp()],
    of=ENDS,
    hidden_rule="multiple_of_heads",
)
