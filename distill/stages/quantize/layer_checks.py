"""Whether the grids of a quantize stage fit the layers of a model, by its config."""

from __future__ import annotations

from collections.abc import Callable

from distill.core.errors import InputError
from distill.models.configs import count
from distill.models.layouts import find_layout
from distill.pruning.layout import Config, Layout, shape
from distill.quantization.base import DEFAULT_SKIP, Layers, QuantizerSpec, grid_of, matches
from distill.quantization.kv_cache import CacheType, check_cache


def check_layers(
    config: Config,
    quantizer: QuantizerSpec,
    layers: Layers,
    *,
    kv_cache: CacheType | None,
    rounding: str,
    embeddings: Callable[[int], QuantizerSpec | None],
) -> None:
    """Refuse grids, patterns and a cache that do not fit the model's layers.

    Args:
        config: of the model that is quantized.
        quantizer: the grid, and what it leaves alone.
        layers: other grids for some of the layers.
        kv_cache: type of the cache of keys and values, or None.
        rounding: how codes are chosen.
        embeddings: length of a row of the embeddings -> their grid, or None where they are kept.

    Raises:
        InputError: they do not fit.
    """
    layout = find_layout(config)
    if layout is None or count(config) is None:
        return
    sizes = layout.sizes(config)
    if kv_cache is not None:
        check_cache(kv_cache, sizes["head_dim"])
    _check_patterns(quantizer, layers, layout, config)
    for parameter in layout.parameters:
        name = parameter.path.removesuffix(".weight")
        holder = name.rpartition(".")[0]
        if parameter.axes[0] == "vocabulary" and len(parameter.axes) == 2 and parameter.exists(config):
            width = shape(parameter, sizes)[1]
            if (grid := embeddings(width)) is not None:
                grid.groups(width)
        if len(parameter.axes) == 3 and not quantizer.skips(holder):
            raise InputError(
                f"{holder} holds the experts' weights as one tensor, which cannot be quantized; add "
                f"{holder.rpartition('.')[2]!r} to skip to ship them as they are"
            )
        if len(parameter.axes) == 2 and "{layer}" in name and not quantizer.skips(name):
            grid = grid_of(name, quantizer, layers)
            grid.groups(shape(parameter, sizes)[1])
            if rounding == "gptq" and not grid.keeps_scale:
                raise InputError(
                    f"{name}: rounding: gptq supports symmetric integer quantizers (got {grid.label()}); "
                    "use rounding: nearest"
                )


def _check_patterns(grid: QuantizerSpec, others: Layers, layout: Layout, config: Config) -> None:
    """Whether each pattern fits some layer.

    Raises:
        InputError: it does not.
    """
    matrices = [parameter for parameter in layout.parameters if len(parameter.axes) > 1]
    layers = range(layout.sizes(config)["layers"])
    names = {
        path.rpartition(".")[0].format(layer=layer)
        for path in (parameter.path for parameter in matrices)
        for layer in (layers if "{layer}" in path else layers[:1])
    }
    asked = [("skip", pattern) for pattern in grid.skip if pattern not in DEFAULT_SKIP]
    asked += [("include", pattern) for pattern in grid.include] + [("layers", pattern) for pattern, _ in others]
    for key, pattern in asked:
        if not any(matches(pattern, name) for name in names):
            called = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
            raise InputError(f"{key}: {pattern!r} matches no layer (the model has {called}); fix or remove it")
