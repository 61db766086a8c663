"""distill: from a big language model to a small one that is ready to ship, by one recipe or in Python.

    recipe = distill.Recipe.load("recipes/quickstart.yaml", set=["stages.distill.optimizer.lr=5e-4"])
    run = distill.run(recipe)

    student = distill.prune(teacher, batches, keep={"intermediate_size": "50%"})
    module = distill.DistillationModule(student, [distill.losses.ForwardKL()], teacher)  # for any Lightning Trainer

Names are loaded when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

__version__ = "0.2.0"

_OTHERS = ("distill_slm",)
"""Other packages of the index whose import is called distill too; their files and ours end up in one folder."""


def _refuse_others(site: Path) -> None:
    """Raise an ImportError if another package has written into the folder of this one.

    Args:
        site: the folder that holds the package.
    """
    for other in _OTHERS:
        if any(site.glob(f"{other}-*.dist-info")):
            name = other.replace("_", "-")
            raise ImportError(
                f"{name} is installed beside distill-lm, and both are imported as distill, so their files are mixed: "
                f"pip uninstall -y {name} distill-lm && pip install distill-lm"
            )


_refuse_others(Path(__file__).parents[1])

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
    "OptimizerSpec": "distill.training.spec",
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
