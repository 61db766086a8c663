"""Conversations that every machine has: questions about the running Python's library, answered by its docstrings.

Use it to try a recipe for conversations without a download. Less than two thousand short conversations of one kind
teach a small model the form of a conversation, and to stop; they are too few to train an assistant.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Literal

from distill.data.base import Conversation, Document, Message, SourceSpec, digest
from distill.data.python_docs import PythonDocs

_LENGTHS = range(20, 400)
"""Number of characters of an answer; shorter ones say nothing, longer ones are manuals."""
Named = ast.FunctionDef | ast.ClassDef


class PythonQuestions(SourceSpec):
    """Questions about the running Python's library, answered by its docstrings; needs no download."""

    kind: Literal["python_questions"] = "python_questions"

    def documents(self) -> Iterator[Conversation]:
        """Yield one conversation per function or class with a docstring, sorted by module."""
        return iter(_all())

    def fingerprint(self) -> str:
        """A hash of the names and texts."""
        total = hashlib.sha256()
        for conversation in _all():
            total.update(conversation.id.encode() + b"\0" + digest(conversation.text))
        return total.hexdigest()

    def num_bytes(self) -> int | None:
        """The size of the text."""
        return sum(len(conversation.text.encode("utf-8")) for conversation in _all())

    def holds_conversations(self) -> bool:
        """True: it yields conversations."""
        return True

    def split_key(self, document: Document | Conversation) -> str:
        """The name, so that a conversation stays on its side of the split when a new Python changes its docstring."""
        return document.id


@cache
def _all() -> tuple[Conversation, ...]:
    found: dict[str, Conversation] = {}  # by text: modules that re-export a function define it once
    for module in PythonDocs(parts="sources").documents():
        for conversation in _of_module(module.id.removeprefix("module:"), module.text):
            found.setdefault(conversation.text, conversation)
    return tuple(found.values())


def _of_module(module: str, source: str) -> Iterator[Conversation]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's warnings about invalid escape sequences in the library
        try:
            body = ast.parse(source).body
        except (SyntaxError, ValueError):
            return
    if any(part.startswith("_") for part in module.split(".")):
        return
    for node in body:
        if isinstance(node, Named) and not node.name.startswith("_"):
            answer = " ".join(inspect.cleandoc(ast.get_docstring(node) or "").split("\n\n")[0].split())
            if len(answer) in _LENGTHS:
                yield _conversation(f"{module}.{node.name}", node, answer)


def _conversation(name: str, node: Named, answer: str) -> Conversation:
    question = f"What does {name} do?" if isinstance(node, ast.FunctionDef) else f"What is {name}?"
    messages: list[Message] = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if isinstance(node, ast.FunctionDef) and (arguments := ast.unparse(node.args)):
        messages.append({"role": "user", "content": "How is it called?"})
        messages.append({"role": "assistant", "content": f"{node.name}({arguments})"})
    return Conversation(f"python:{name}", tuple(messages), tuple(m["role"] == "assistant" for m in messages))
