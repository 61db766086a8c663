"""Signals stop the work between two units of it, and nothing makes them vanish or holds them up."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from distill.core import listener, stop
from distill.core.artifact import write_text
from distill.core.errors import InputError, Interrupted, Preempted, Stopped
from tests.faults.chaos import as_on_a_terminal

ROOT = Path(stop.__file__).parents[1]
CODES = {signal.SIGTERM: 75, signal.SIGUSR1: 75, signal.SIGHUP: 75, signal.SIGINT: 130}


pytestmark = pytest.mark.usefixtures("as_on_a_terminal")


def send(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


def stopped(work: Callable[[], object], seconds: float = 60, *, held: bool = False) -> Stopped:
    """The exception that ends some work."""
    with pytest.raises(Stopped) as caught, stop.listening(), stop.patient(seconds, held=held):
        work()
    return caught.value


@pytest.mark.parametrize(("number", "code"), CODES.items())
def test_a_signal_waits_for_the_end_of_the_unit(number: signal.Signals, code: int) -> None:
    before, done = signal.getsignal(number), []

    def work() -> None:
        for unit in stop.stoppable(range(5)):
            if unit == 2:
                send(number)
            done.append(unit)

    assert stopped(work).exit_code == code
    assert done == [0, 1, 2]
    assert signal.getsignal(number) is before
    assert stop.asked() == 0
    stop.check()  # nobody listens any more


def test_no_except_clause_for_errors_takes_it() -> None:
    def work() -> None:
        send()
        try:
            stop.check()
        except Exception:
            pytest.fail("taken for an error")

    assert isinstance(stopped(work), Preempted)


def test_the_first_signal_counts() -> None:
    def work() -> None:
        send(signal.SIGINT)
        send(signal.SIGTERM)
        stop.check()

    assert isinstance(stopped(work), Interrupted)


def test_what_looks_by_itself_is_not_stopped_and_an_end_after_a_signal_is_no_success() -> None:
    def work() -> None:
        send()
        stop.check()
        done.append(stop.asked())

    done: list[int] = []
    assert isinstance(stopped(work, held=True), Preempted)
    assert done == [signal.SIGTERM]


def test_an_error_after_a_signal_is_the_signals() -> None:
    """A library may have made it of the exception; the same command would tell it again if it had not."""

    def work() -> None:
        send()
        fail()

    def fail() -> None:
        raise InputError("the model cannot be loaded")

    assert str(stopped(work)) == "stopped by SIGTERM (the model cannot be loaded); the same command goes on"
    with pytest.raises(InputError), stop.listening():
        fail()


def test_nothing_that_looks_is_needed() -> None:
    def work() -> None:
        send()
        time.sleep(60)

    assert isinstance(stopped(work, 0.2), Preempted)


def test_it_is_raised_again_where_python_drops_it(monkeypatch: pytest.MonkeyPatch) -> None:
    dropped: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", dropped.append)

    class Library:
        def __del__(self) -> None:
            send()

    def work() -> None:
        held = Library()
        del held
        dropped.append("and went on")
        stop.check()

    assert isinstance(stopped(work, 0), Preempted)
    assert isinstance(dropped[0].exc_value, Preempted)
    assert dropped[1] == "and went on"


def test_what_a_lost_exception_has_led_to_is_not_kept(tmp_path: Path) -> None:
    def work() -> None:
        send()
        try:
            stop.check()
        except BaseException:
            answer = "what a library makes of it"
        write_text(tmp_path / "answer", answer)

    assert isinstance(stopped(work), Preempted)
    assert list(tmp_path.iterdir()) == []


def test_a_second_signal_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    def work() -> None:
        send()
        send()
        for _ in range(600):  # a long sleep is not interrupted if another thread has received the signal
            time.sleep(0.1)

    monkeypatch.setattr(listener, "DEBOUNCE_S", 0.0)
    assert isinstance(stopped(work, held=True), Preempted)


def test_another_thread_may_ask_for_another_process() -> None:
    def work() -> None:
        thread = threading.Thread(target=stop.ask, args=(signal.SIGINT,))
        thread.start()
        thread.join()
        stop.check()

    assert isinstance(stopped(work), Interrupted)


def test_a_process_beside_the_main_one_asks_nobody() -> None:
    with stop.listening(), stop.patient(60, held=True):
        child = os.fork()
        if child == 0:
            for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):  # meant for its parent
                send(number)
            os._exit(stop.asked())
        assert os.waitpid(child, 0)[1] == 0
        time.sleep(0.1)
        assert stop.asked() == 0


def test_a_reading_process_outlives_a_signal_to_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop, "WORKER_S", 0.2)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        stop.in_worker()
        send()
        os.write(write, b"still here")
        time.sleep(60)
    assert os.read(read, 100) == b"still here"
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGALRM


def program(body: str) -> subprocess.Popen[str]:
    """A command line of its own, whose bounds are short."""
    head = """
import hashlib, os, signal, subprocess, sys, time
from distill.core import listener, stop
listener.PATIENCE_S, listener.LEAVE_S, listener.DEBOUNCE_S = 0.3, 0.3, 0.1
"""
    process = subprocess.Popen(
        [sys.executable, "-c", head + body],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=as_on_a_terminal,
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("ready"), process.communicate()
    return process


BUSY = "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"
"""A call into C that takes minutes, and looks at no signal."""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_library_that_does_not_return_is_left(number: signal.Signals, code: int) -> None:
    process = program(f"""
stop.listen()
with stop.listening(), stop.patient():
    print("ready", flush=True)
    {BUSY}
""")
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code
    assert error.count("; the same command goes on\n") == 1
    assert "Traceback" not in error


def test_what_it_has_started_ends_with_it() -> None:
    process = program(f"""
stop.listen()
body = "import subprocess; print(subprocess.Popen(['sleep', '600']).pid); input()"
pipes = {{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}}
child = subprocess.Popen([sys.executable, "-c", body], text=True, **pipes)
grandchild = child.stdout.readline().strip()
print("ready", flush=True)
print(child.pid, grandchild, flush=True)
{BUSY}
""")
    assert process.stdout is not None
    children = process.stdout.readline().split()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    until = time.monotonic() + 30
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < until, children
        time.sleep(0.05)


def test_a_second_signal_ends_a_busy_process_at_once() -> None:
    process = program(f"""
stop.listen()
with stop.patient(600, held=True):
    print("ready", flush=True)
    {BUSY}
""")
    process.send_signal(signal.SIGUSR1)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 75
    assert error.splitlines() == [
        *(line for line in error.splitlines() if "again stops at once" in line),
        "stopped by SIGUSR1, at once; the same command goes on",
    ]


def test_a_stop_that_is_caught_by_nothing_is_one_line() -> None:
    process = program('stop.listen(); print("ready", flush=True); time.sleep(60)')
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[1] == "stopped by SIGTERM; the same command goes on\n"
    assert process.returncode == 75


def test_what_is_finished_is_a_success_whatever_comes_then() -> None:
    process = program("""
import atexit
listener.LEAVE_S = 60.0
stop.listen()
stop.finish()
class Late:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
sys.late = Late()  # deleted when Python has given the signals back
atexit.register(lambda: (print("ready", flush=True), time.sleep(0.5)))
stop.leave(0)
""")
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == 0


def test_the_command_listens_before_any_library_is_loaded_and_until_then_is_any_program() -> None:
    code = """
import os, signal, sys
import distill.__main__
print({"torch", "transformers", "typer", "pydantic", "yaml", "numpy"} & {*sys.modules}, flush=True)
distill.__main__.stop.listen = lambda: os.kill(os.getpid(), signal.SIGTERM)
distill.__main__.main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGTERM, "set()\n", "")


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT], ids=["nohup", "background"])
def test_nohup_is_respected(number: signal.Signals) -> None:
    """As the shell does for ``nohup``, and for what a script starts in the background."""
    process = program(f"""
signal.signal({int(number)}, signal.SIG_IGN)
stop.listen()
print("ready", flush=True)
time.sleep(0.5)
stop.check()
sys.exit(7)
""")
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == 7


def test_nothing_is_sent_once_the_signals_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread may still be looking at its bounds then, and its own SIGTERM would end the process."""
    sent: list[Any] = []
    monkeypatch.setattr(signal, "pthread_kill", lambda *given: sent.append(given))
    heard = listener.Listener(ends_process=False)
    heard.open()
    heard._nudge()
    assert len(sent) == 1
    heard.close()
    heard._nudge()
    assert len(sent) == 1


def test_what_is_left_after_the_end_is_bounded_too() -> None:
    """As W&B's last upload is."""
    process = program(f'stop.listen(); stop.finish(); print("ready", flush=True); {BUSY}')
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[1] == "SIGTERM: everything is done; what was left to end has been left\n"
    assert process.returncode == 0


def test_what_is_raised_for_a_signal_is_no_exception() -> None:
    """Else code that catches the errors of a library would take it for one."""
    raised: list[tuple[str, object]] = []
    for file in sorted(ROOT.rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        tests = [
            node for node in ast.walk(tree) if isinstance(node, ast.If) and "stop.asked()" in ast.unparse(node.test)
        ]
        names = [
            ast.unparse(thrown.exc.func if isinstance(thrown.exc, ast.Call) else thrown.exc)
            for test in tests
            for line in test.body
            for thrown in ast.walk(line)
            if isinstance(thrown, ast.Raise) and thrown.exc is not None
        ]
        module = import_module(".".join(file.relative_to(ROOT.parent).with_suffix("").parts)) if names else None
        raised += [(name, attrgetter(name)(module)) for name in names]
    for name, what in raised:
        kind = what if isinstance(what, type) else get_type_hints(what)["return"]
        assert issubclass(kind, BaseException), name
        assert not issubclass(kind, Exception), name
    assert {name for name, _ in raised} >= {"GivenUp", "stop.stopped"}
    for one in (Stopped, *listener.KINDS.values()):
        assert not issubclass(one, Exception)
