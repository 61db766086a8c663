"""The exam stage: what models know of documents, without them and with them."""

from distill.stages.exam.spec import Exam

__all__ = ["Exam"]
