"""How a document is put before a question. The writer, the teacher and open-book exams all use this format."""

from __future__ import annotations

from collections.abc import Sequence

from distill.data.base import Message


def with_document(document: str, question: str) -> str:
    """The user's text: the document, then the question about it; only the question if there is no document."""
    return f"{document.strip()}\n\n{question}" if document else question


def messages_with_document(document: str, messages: Sequence[Message]) -> list[Message]:
    """The same conversation, with the document before the text of the first user message."""
    first = next((number for number, message in enumerate(messages) if message["role"] == "user"), None)
    return [
        {**message, "content": with_document(document, message["content"])} if number == first else message
        for number, message in enumerate(messages)
    ]
