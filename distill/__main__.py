"""``python -m distill``, and the command ``distill``."""

from __future__ import annotations

from typing import NoReturn

from distill.core import stop


def main() -> NoReturn:
    """Take over the signals before anything is imported that takes time, then read the command line."""
    stop.listen()
    with stop.patient():
        from distill.cli import main
    main()


if __name__ == "__main__":
    main()
