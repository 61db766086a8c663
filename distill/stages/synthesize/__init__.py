"""The synthesize stage: a writer makes a data set of answers, of questions about documents, or of other words."""

from distill.stages.synthesize.spec import Synthesize

__all__ = ["Synthesize"]
