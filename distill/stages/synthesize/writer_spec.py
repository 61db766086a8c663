"""The writer of the rows: a model of the run, or a server."""

from __future__ import annotations

import os
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import Discriminator, Field, Tag, field_validator

from distill.core.errors import InputError
from distill.core.spec import VARIABLE, Spec


class ServerSpec(Spec):
    """A server with OpenAI's chat endpoint, such as vLLM, llama.cpp or a hosted one."""

    server: str
    """Address including the version, such as http://localhost:8000/v1."""
    model: str | None = None
    """Name of the model as the server lists it; unset: its only model."""
    key_variable: str | None = Field(None, pattern=VARIABLE)
    """Environment variable with the key, such as OPENAI_API_KEY; unset: no key. Keys are never in a recipe."""
    parallel: int = Field(4, ge=1, le=256)
    """Number of parallel requests."""
    timeout_s: float = Field(300, gt=0)
    """Largest number of seconds for one request."""
    max_wait_s: float = Field(600, ge=0)
    """Largest number of seconds without an answer from the server before the run stops; finished replies are kept."""

    def key(self) -> str | None:
        """The key; None where none is needed.

        Raises:
            InputError: the environment does not have it, or its value is not a key.
        """
        if self.key_variable is None:
            return None
        key = os.environ.get(self.key_variable, "").strip()
        if not key:
            raise InputError(f"writer.key_variable: the environment has no {self.key_variable}; export it")
        if not (key.isascii() and key.isprintable()):
            raise InputError(
                f"writer.key_variable: {self.key_variable} holds a line break or a character beyond ASCII, which no "
                "key has; export the key alone"
            )
        return key

    def notes(self) -> list[str]:
        """What the run will need and this environment lacks."""
        try:
            self.key()
        except InputError as error:
            return [f"{error}, before the run"]
        return []

    @field_validator("server")
    @classmethod
    def _is_an_address(cls, server: str) -> str:
        parts = urlsplit(server)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("needs an address such as http://localhost:8000/v1")
        if not (server.isascii() and server.isprintable()) or " " in server:
            raise ValueError("holds a space or a character beyond ASCII; write it as the server's address is written")
        try:
            port = parts.port
        except ValueError as error:
            raise ValueError(
                f"{str(error)[:1].lower()}{str(error)[1:]}; write it as http://localhost:8000/v1"
            ) from None
        if port == 0:
            raise ValueError("port 0 is none; write it as http://localhost:8000/v1")
        if parts.username or parts.password or parts.query:
            raise ValueError("holds a secret or a query; name a key by key_variable")
        return server


def _how(value: Any) -> str | None:
    """Which form of the key was written, by names that are no keys, so that a mistake is told at the right key."""
    if isinstance(value, str):
        return "a model"
    return "a server" if isinstance(value, dict | ServerSpec) else None


WriterChoice = Annotated[
    Annotated[str, Tag("a model")] | Annotated[ServerSpec, Tag("a server")],
    Discriminator(
        _how,
        custom_error_type="writer_choice",
        custom_error_message="needs a model of the run (teacher, a stage, a folder, a Hub id) or {server: http://...}",
    ),
]
