"""The `data.chat` section of a recipe: how conversations become text, and which of its tokens are learned from."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from distill.core.errors import InputError
from distill.core.outside import is_folder, read, read_json
from distill.core.spec import Spec

LearnFrom = Literal["assistant", "all", "last"]
TooLong = Literal["drop", "cut_turns"]
Text = str | dict[str, str]
"""Template text, or several named templates (name -> text). ``tool_use`` is for conversations with tools."""
_OURS = ("messages", "tools", "documents", "add_generation_prompt", "strftime_now")


class ChatSpec(Spec):
    """How conversations become rows: with which chat template, and which of their tokens are learned from."""

    template: str = "teacher"
    """`teacher`, `student` (the template of the model from which the first training starts), a `.jinja` file, or the
    template itself. Student and teacher both use it, and models of the run are saved with it."""
    arguments: dict[str, Any] = Field({})
    """Arguments of the template, such as {enable_thinking: false}; a row's `chat_template_kwargs` override them."""
    today: date | None = None
    """Fixed date, such as 2026-01-01, for templates that ask for today's date; with null they raise an error, because
    the text would change from day to day."""
    learn_from: LearnFrom = "assistant"
    """Which tokens of the training text are trained on. assistant: those that the assistant writes, with the stop
    token; last: those of its last turn only; all: every token, including prompts. Validation always uses the
    assistant's tokens."""
    too_long: TooLong = "drop"
    """What happens to conversations with more tokens than sequence_length. drop: they are left out and counted;
    cut_turns: the turns that end within it are kept. Nothing is cut inside a turn."""

    def written(self) -> Text | None:
        """The template that the recipe gives itself; None if it is that of a model.

        Raises:
            InputError: there is no such file.
        """
        if self.template in ("teacher", "student"):
            return None
        if "{" in self.template:  # not a file name
            return self.template
        if (text := read_template(self.template)) is None:
            raise InputError(f"data.chat.template: {self.template}: no such file, seen from {Path.cwd()}")
        return text

    @field_validator("arguments")
    @classmethod
    def _only_the_templates_own(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        if ours := [name for name in arguments if name in _OURS]:
            raise ValueError(f"{ours[0]} is set for each conversation, so it has no effect here; remove it")
        return arguments


def read_template(location: str | Path) -> Text | None:
    """The template in a model folder or in a file; None if there is none. Does not import transformers.

    Raises:
        InputError: a file cannot be read.
    """
    place = Path(location)
    file = place / "chat_template.jinja" if is_folder(place) else place
    if file.exists():
        try:
            return read(file).decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{file}: cannot be read as a chat template ({error})") from None
    if not (config := place / "tokenizer_config.json").is_file():
        return None
    found = read_json(config).get("chat_template")
    if isinstance(found, list):  # of {name, template}
        return {str(one.get("name")): str(one.get("template")) for one in found if isinstance(one, dict)}
    return found if isinstance(found, str) else None
