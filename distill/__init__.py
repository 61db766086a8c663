"""distill: from a big language model to a small one that is ready to ship, by one recipe.

    recipe = distill.Recipe.load("recipes/quickstart.yaml", set=["stages.distill.optimizer.lr=5e-4"])
    run = distill.run(recipe)

Names are loaded when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Recipe": "distill.recipe",
    "run": "distill.runner",
    "open_run": "distill.api.open_run",
    "load": "distill.api.load",
    "batches": "distill.api.batches",
    "prune": "distill.api.prune",
    "prune_with_plan": "distill.api.prune",
    "quantize": "distill.api.quantize",
    "evaluate": "distill.api.evaluate",
    "export": "distill.api.export",
    "cache_teacher": "distill.api.cache_teacher",
    "DistillationModule": "distill.training.module",
    "losses": "distill.losses",
    "pruning": "distill.pruning",
    "quantization": "distill.quantization",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'distill' has no attribute {name!r}")
    if name == "run":  # as on the command line; its parts leave the environment of another program as it is
        import_module("distill.core.threads").choose()
    module = import_module(_PUBLIC[name])
    return module if module.__name__ == f"distill.{name}" else getattr(module, name)
