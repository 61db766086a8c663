"""Numerics that several packages share: KL divergence, sums over tokens, statistics of task scores, loss forecasts."""
