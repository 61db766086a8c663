"""One of several processes that ``distill run`` has started on this machine: ``python -m distill.worker``."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable
from typing import NoReturn

from distill.core import stop
from distill.core.errors import MachineError


def main() -> NoReturn:
    """Run the recipe that stands on standard input, and end when whoever wrote it there is gone."""
    stop.listen()
    with stop.patient():
        from distill.cli import exit_with
    lines = open(0, "rb", buffering=0, closefd=False)  # noqa: SIM115  # without the lock that sys.stdin has at the end
    order = json.loads(lines.readline())
    threading.Thread(target=_hear_the_launcher, args=(lines,), daemon=True, name="launcher").start()
    exit_with(lambda: _run(order))


def _run(order: dict[str, str | None]) -> None:
    from distill.cli import unattended

    with unattended():
        from distill.recipe import Recipe
        from distill.runner import run

        recipe = Recipe.from_text(str(order.pop("recipe")))
        run(recipe, order["run_dir"], only=order["only"], start=order["start"], command=order["command"])


def _hear_the_launcher(lines: Iterable[bytes]) -> None:
    """Each line is the number of a signal that the launcher has got; no line comes any more when it is gone."""
    for line in lines:
        stop.ask(json.loads(line))
    os._exit(stop.exit_code(MachineError.exit_code))


if __name__ == "__main__":
    main()
