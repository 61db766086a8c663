"""Phi-3, Phi-3.5 and Phi-4: Llama with q, k and v in one projection, and gate and up in another.

With long contexts (LongRoPE) the config class checks the number of rotary factors against hidden size / heads and
ignores ``head_dim``, so hidden size and heads must keep their ratio.
"""

from distill.models.layouts.parts import GATE_AND_UP, GROUPS, HEADS, HIDDEN, LAYER, NEURONS, decoder, linear, pre_norms
from distill.pruning.layout import Config, HiddenRule


def hidden_rule(config: Config) -> HiddenRule:
    """What the config class requires of the hidden size."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return "heads_times_head_dim" if rope.get("short_factor") else "free"


LAYOUT = decoder(
    "phi3",
    [
        *pre_norms(),
        *linear(f"{LAYER}.self_attn.qkv_proj", (HEADS, GROUPS, GROUPS), HIDDEN, bias=False),
        *linear(f"{LAYER}.self_attn.o_proj", HIDDEN, HEADS, bias=False),
        *linear(f"{LAYER}.mlp.gate_up_proj", GATE_AND_UP, HIDDEN, bias=False),
        *linear(f"{LAYER}.mlp.down_proj", HIDDEN, NEURONS, bias=False),
    ],
    hidden_rule=hidden_rule,
    projections={},
)
