"""The evaluate stage: size, speed, memory and quality of every model of a run."""

from distill.stages.evaluate.spec import Evaluate

__all__ = ["Evaluate"]
