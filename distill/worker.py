"""One of several processes that ``distill run`` has started on this machine: ``python -m distill.worker``."""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import NoReturn

from distill.cli import exit_with
from distill.core.errors import MachineError


def main() -> NoReturn:
    """Run the recipe that stands on standard input, and end when whoever wrote it there is gone."""
    order = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_the_launcher, daemon=True, name="launcher").start()
    exit_with(lambda: _run(order))


def _run(order: dict[str, str | None]) -> None:
    from distill.recipe import Recipe
    from distill.runner import run

    recipe = Recipe.from_text(str(order.pop("recipe")))
    run(recipe, order["run_dir"], only=order["only"], start=order["start"], command=order["command"])


def _end_with_the_launcher() -> None:
    sys.stdin.read()
    os._exit(MachineError.exit_code)


if __name__ == "__main__":
    main()
