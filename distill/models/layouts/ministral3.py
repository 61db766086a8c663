"""Ministral 3 (text): Mistral with a head size of its own and a scale of the queries that grows with the position."""

from distill.models.layouts.parts import attention, decoder, gated_mlp, pre_norms

LAYOUT = decoder("ministral3", [*pre_norms(), *attention(), *gated_mlp()])
