"""Versions of the packages that a run's figures depend on."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

PACKAGES = (
    "torch",
    "transformers",
    "pytorch-lightning",
    "peft",
    "datasets",
    "wandb",
    "torchmetrics",
    "compressed-tensors",
)


def versions() -> dict[str, str]:
    """Package -> version of what a run's figures depend on."""
    return {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
