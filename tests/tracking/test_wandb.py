"""W&B offline really writes, and W&B broken never stops a run."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb

from distill.reporting.tables import measured_figures, whole_table
from distill.reporting.tradeoff import Row
from distill.tracking import wandb as tracking
from distill.tracking.spec import LoggingSpec

KEY = "a" * 40


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A run folder, and a machine on which nobody has ever used wandb."""
    wandb.teardown()  # first, as WANDB_SERVICE comes back afterwards and must not name a service that is gone
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_SERVICE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "run"
    wandb.teardown()


def use(logger: tracking.SafeLogger | None, folder: Path) -> str | None:
    """All that a run does with its logger."""
    folder.mkdir(exist_ok=True)
    page = folder / "index.html"
    page.write_text("<p>report</p>")
    if logger is not None:
        logger.log_hyperparams({"lr": 0.1})
        for step in range(3):
            logger.log_metrics({"train/loss": 1.0 / (1 + step)}, step=step)
    rows = [Row("teacher", "teacher", perplexity=3.0), Row("int4", kernel="simulated", perplexity=4.0)]
    table, figures = whole_table(rows), measured_figures(rows)
    prompts = [{"prompt": "p", "answers": {"teacher": {"text": "x"}}}]
    tracking.log_report(logger, table, figures, html=page, prompts=prompts)
    return tracking.finish(logger)


def make(mode: str, folder: Path) -> tracking.SafeLogger | None:
    spec = LoggingSpec.model_validate({"wandb": mode, "tags": ["test"]})
    return tracking.make_logger(spec, folder, "run1", "name", {"stages": {"a": 1}, "path": folder})


@pytest.mark.parametrize("mode", ["offline", "auto"])
def test_offline_writes_a_run_and_says_how_to_sync(
    mode: str, folder: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    line = use(make(mode, folder), folder)
    (written,) = (folder / "wandb").glob("offline-run-*-run1")
    assert line == f"wandb sync {written}"
    assert (written / "run-run1.wandb").stat().st_size > 1000
    assert {file.name.split("_")[0] for file in (written / "files/media").rglob("*.json")} == {"tradeoff", "prompts"}
    assert list((written / "files/media").rglob("*.html"))
    assert capfd.readouterr().err == ""  # no banner, no advertisement
    assert caplog.messages == []


def test_links_in_a_report_are_not_uploaded(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []
    monkeypatch.setattr(wandb.Artifact, "add_file", lambda self, file, name: sent.append(name))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "secret.txt").write_text("secret")
    (folder / "plots").mkdir(parents=True)
    (folder / "plots" / "plot.png").write_bytes(b"png")
    (folder / "linked.txt").symlink_to(tmp_path / "elsewhere" / "secret.txt")
    (folder / "linked.folder").symlink_to(tmp_path / "elsewhere")
    (folder / "within.txt").symlink_to("index.html")
    use(make("offline", folder), folder)
    assert [name for name in sent if not name.startswith("wandb/")] == ["index.html", "plots/plot.png"]


@pytest.mark.parametrize(("mode", "wish"), [("auto", "online"), ("auto", None), ("online", None)])
def test_an_unreachable_host_costs_one_line(
    mode: str, wish: str | None, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    if wish:
        monkeypatch.setenv("WANDB_MODE", wish)
    started = time.monotonic()
    assert "wandb sync" in str(use(make(mode, folder), folder))
    assert time.monotonic() - started < 30  # a guard against wandb's own minutes of retries, not a measurement
    assert caplog.messages == ["W&B: http://127.0.0.1:9 does not answer, so the run is logged offline"]


def test_online_that_fails_to_open_falls_back(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(tracking, "answers", lambda *_: True)
    real = wandb.init

    def refuse(**settings: Any) -> Any:
        if settings["mode"] == "online":
            raise wandb.errors.CommError("401\nmore")
        return real(**settings)

    monkeypatch.setattr(wandb, "init", refuse)
    assert "offline-run" in str(use(make("online", folder), folder))
    assert caplog.messages == ["W&B cannot be opened online, the run continues (CommError: 401)"]


def test_not_even_offline_is_none(folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    def refuse(**_: Any) -> Any:
        raise OSError("disk full")

    monkeypatch.setattr(wandb, "init", refuse)
    assert make("offline", folder) is None
    assert caplog.messages == ["W&B cannot be opened offline, the run continues (OSError: disk full)"]


def test_disabled_is_none(folder: Path) -> None:
    assert make("disabled", folder) is None
    assert use(None, folder) is None
    assert not (folder / "wandb").exists()


def test_a_failure_in_the_middle_is_said_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    logger = make("offline", folder)
    assert logger is not None

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("pipe broke\nsecond line")

    monkeypatch.setattr(logger.experiment, "log", fail)
    with caplog.at_level(logging.WARNING):
        assert "wandb sync" in str(use(logger, folder))
    assert caplog.messages == ["W&B logging stopped, the run continues (OSError: pipe broke)"]
    assert logger.broken


def test_whether_a_host_answers() -> None:
    assert not tracking.answers("http://127.0.0.1:9", 2)
    assert not tracking.answers("", 1)


def test_what_a_kill_leaves_is_in_the_run_folder_and_goes_at_the_next_start(folder: Path, tmp_path: Path) -> None:
    """wandb makes temporary folders as it is imported, and removes them only when it ends as it should."""
    code = (
        "import os, sys\n"
        "from distill.tracking.spec import LoggingSpec\n"
        "from distill.tracking.wandb import make_logger\n"
        "assert 'wandb' not in sys.modules, 'else it would be too late'\n"
        "assert make_logger(LoggingSpec(wandb='offline'), sys.argv[1], 'run1', 'name', {}) is not None\n"
        "os._exit(7)\n"
    )
    elsewhere = tmp_path / "tmp"
    elsewhere.mkdir()
    left = []
    for _ in range(2):
        command = [sys.executable, "-c", code, str(folder)]
        assert subprocess.run(command, env=os.environ | {"TMPDIR": str(elsewhere)}).returncode == 7
        left.append({path.name for path in (folder / tracking.TEMPORARY).iterdir()})
    assert [path for path in elsewhere.iterdir() if path.is_dir() and path.name.startswith("tmp")] == []
    assert left[0]
    assert left[0].isdisjoint(left[1])
