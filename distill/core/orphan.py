"""A process that was started to help another one, and ends when that one does, however it ends."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from typing import NoReturn

LOOK_S = 0.5
_PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> None:
    """Let the system kill this process when its parent has ended, in the middle of whatever it does.

    Linux does so when the thread ends that has started this process, so that thread must live as long as its process.

    Args:
        parent: its process id, as the parent itself knows it: by now another process may be in its place.
    """
    try:
        is_promised = ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) == 0
    except (OSError, AttributeError):  # no Linux
        is_promised = False
    if os.getppid() != parent:
        _end()
    if not is_promised:
        threading.Thread(target=_look, args=(parent,), daemon=True, name="orphan").start()


def _look(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK_S)
    _end()


def _end() -> NoReturn:
    os._exit(1)
