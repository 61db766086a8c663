"""Mixtral: Mistral with a mixture of experts in each layer in place of the MLP."""

from distill.models.layouts.parts import LAYER, SIZE_KEYS, attention, decoder, expert_mlp, pre_norms

LAYOUT = decoder(
    "mixtral",
    [*pre_norms(), *attention(), *expert_mlp()],
    size_keys={**SIZE_KEYS, "experts": ("num_local_experts", "num_experts")},
    mlp_down=None,
    experts=f"{LAYER}.mlp.experts",
)
