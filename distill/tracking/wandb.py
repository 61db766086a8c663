"""Logging to Weights & Biases. A failure never stops a run: it prints one warning, and the run folder has all data.

This is the only file of the project that imports wandb.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import netrc
import os
import shutil
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.loggers.logger import DummyExperiment
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from distill.core.seal import files_of
from distill.core.secrets import redacted
from distill.tracking.spec import LoggingSpec

INIT_SECONDS = 15.0
"""Time limit for opening a run, in seconds."""
ANSWER_SECONDS = 5.0
"""Time limit for an answer of the host; after that the run is logged offline."""
FINISH_SECONDS = 60.0
"""Time limit for the last upload; after that the user can run ``wandb sync``."""
TEMPORARY = Path("wandb", "temporary")
"""Folder for wandb's temporary files, relative to the run folder."""


def guarded(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a method of the logger so that an exception prints one warning and disables the logger."""

    @functools.wraps(method)
    def call(self: SafeLogger, *args: Any, **kwargs: Any) -> Any:
        if self.broken:
            return None
        try:
            return method(self, *args, **kwargs)
        except Exception as error:
            self.give_up(error)
            return None

    return call


class SafeLogger(WandbLogger):
    """Lightning's ``WandbLogger`` that never raises.

    Attributes:
        broken: whether an earlier call failed; nothing is sent after that.
        sync_folder: wandb's folder of this run, once it is open.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self._wandb_init.pop("anonymous", None)  # wandb warns about it, and Lightning passes it unasked
        self.broken = False
        self.sync_folder: Path | None = None

    @property
    def experiment(self) -> Any:
        """The wandb run, or a dummy that ignores all calls after wandb has failed."""
        if self.broken:
            return DummyExperiment()
        try:
            return super().experiment
        except Exception as error:
            self.give_up(error)
            return DummyExperiment()

    def open(self) -> Any:
        """Open and return the wandb run; the only method that can raise."""
        return super().experiment

    def give_up(self, error: Exception) -> None:
        """Print one warning and disable the logger."""
        if not self.broken:
            self.broken = True
            _warn(f"W&B logging stopped, the run continues ({_line(error)})")

    log_metrics = guarded(WandbLogger.log_metrics)
    log_hyperparams = guarded(WandbLogger.log_hyperparams)
    log_table = guarded(WandbLogger.log_table)
    log_text = guarded(WandbLogger.log_text)
    log_image = guarded(WandbLogger.log_image)
    watch = guarded(WandbLogger.watch)
    finalize = guarded(WandbLogger.finalize)
    after_save_checkpoint = guarded(WandbLogger.after_save_checkpoint)


def make_logger(
    spec: LoggingSpec, run_folder: str | Path, run_id: str, name: str, config: Mapping[str, Any]
) -> SafeLogger | None:
    """Open a run at W&B, online or offline, without raising.

    Args:
        spec: the recipe's ``logging``.
        run_folder: wandb writes to its subfolder ``wandb``.
        run_id: id of the W&B run; a resumed run has the same id and continues its curves.
        name: display name of the run.
        config: the resolved recipe.

    Returns:
        A logger for Lightning's Trainer, or None if W&B is disabled or cannot write even offline.
    """
    for noisy in ("wandb", "opentelemetry"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    if spec.wandb == "disabled":
        return None
    with _temporary_files_in(Path(run_folder) / TEMPORARY):
        mode = resolve_mode(spec)
        for attempt in dict.fromkeys((mode, "offline")) if mode != "disabled" else ():
            logger = _open(spec, Path(run_folder), run_id, name, config, attempt)
            if logger is not None:
                return logger
    return None


@contextlib.contextmanager
def _temporary_files_in(folder: Path) -> Iterator[None]:
    """Inside the context, wandb creates its temporary folders in ``folder``.

    It creates them on import, and does not remove them if the process is killed.

    Folders of an earlier process are removed. If ``folder`` cannot be created, the default location is used.
    """
    if "wandb" in sys.modules:
        yield
        return
    shutil.rmtree(folder, ignore_errors=True)
    before = tempfile.tempdir
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True)
        tempfile.tempdir = str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before


def _open(
    spec: LoggingSpec, folder: Path, run_id: str, name: str, config: Mapping[str, Any], mode: str
) -> SafeLogger | None:
    """Open the run in one mode; None, with a warning, if it fails."""
    try:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        wanted: dict[str, Any] = {"silent": True, "console": "off", "init_timeout": INIT_SECONDS}
        if mode == "online":  # offline there is nothing to wait for
            wanted |= {"finish_timeout": FINISH_SECONDS, "finish_timeout_raises": True}
        settings = wandb.Settings(**{k: v for k, v in wanted.items() if k in wandb.Settings.model_fields})
        plain = json.loads(json.dumps(dict(config), default=str))
        logger = SafeLogger(
            name=name, project=spec.project, entity=spec.entity, tags=list(spec.tags) or None, id=run_id,
            save_dir=str(folder), mode=mode, config=plain, settings=settings,
        )  # fmt: skip
        if _first_rank():
            with _redacted_arguments():
                run = logger.open()
            logger.sync_folder = Path(run.dir).parent
        return logger
    except BaseException as error:
        with contextlib.suppress(Exception):
            wandb.teardown()  # otherwise its service keeps the run's id, and the next attempt fails
        if not isinstance(error, Exception):
            raise
        _warn(f"W&B cannot be opened {mode}, the run continues ({_line(error)})")
        return None


@contextlib.contextmanager
def _redacted_arguments() -> Iterator[None]:
    """Within the block the command line, which wandb stores with a run, has no secrets in it."""
    before = sys.argv
    sys.argv = [redacted(argument) for argument in before]
    try:
        yield
    finally:
        sys.argv = before


def resolve_mode(spec: LoggingSpec) -> str:
    """The mode: online, offline or disabled. If the host does not answer, online becomes offline, with a warning."""
    wish = os.environ.get("WANDB_MODE", "auto") if spec.wandb == "auto" else spec.wandb
    wish = "offline" if wish == "dryrun" else wish
    if wish in {"offline", "disabled"}:
        return wish
    host = _host()
    if not _has_key(host):
        if wish == "online":
            _warn("W&B: no API key (WANDB_API_KEY or 'wandb login'), so the run is logged offline")
        return "offline"
    if not answers(host, ANSWER_SECONDS):
        _warn(f"W&B: {host} does not answer, so the run is logged offline")
        return "offline"
    return "online"


def _host() -> str:
    """The host that wandb itself would use; it is not hard-coded because it has changed before."""
    try:
        import wandb

        return str(wandb.setup(wandb.Settings(silent=True)).settings.base_url)
    except Exception:
        return os.environ.get("WANDB_BASE_URL", "")


def _has_key(host: str) -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    for file in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        try:
            if file and netrc.netrc(os.path.expanduser(file)).authenticators(urlparse(host).hostname or ""):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def answers(host: str, seconds: float) -> bool:
    """Whether a web host answers within ``seconds``, including name resolution and proxy."""
    heard: list[bool] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(host, timeout=seconds).close()
            heard.append(True)
        except urllib.error.HTTPError:
            heard.append(True)  # an error page is an answer
        except (OSError, ValueError):
            heard.append(False)

    thread = threading.Thread(target=ask, daemon=True)  # name resolution has no timeout of its own
    thread.start()
    thread.join(seconds)
    return heard == [True]


def log_report(
    logger: SafeLogger | None,
    table: Sequence[Sequence[str]],
    figures: Mapping[str, Any],
    plots: Mapping[str, Path] | None = None,
    html: Path | None = None,
    prompts: Sequence[Mapping[str, Any]] = (),
    tables: Mapping[str, Sequence[Sequence[str]]] | None = None,
) -> None:
    """Log a report: table, plots, prompts side by side, and the HTML page, inline and as an artifact.

    Args:
        logger: None: nothing is logged.
        table: headings, then one row per model.
        figures: of the models, for the run's summary.
        plots: name -> PNG file.
        html: the report's ``index.html``.
        prompts: from ``evaluation.side_by_side``.
        tables: name -> headings, then rows, of further tables.
    """
    if logger is None or logger.broken or not _first_rank():
        return
    try:
        import wandb

        headings, *rows = table
        found: dict[str, Any] = {"report/tradeoff": wandb.Table(list(headings), [list(row) for row in rows])}
        for name, (heads, *lines) in (tables or {}).items():
            found[f"report/{name}"] = wandb.Table(list(heads), [list(line) for line in lines])
        for name, file in (plots or {}).items():
            found[f"report/{name}"] = wandb.Image(str(file))
        if prompts:
            names = list(prompts[0]["answers"])
            answered = [[item["prompt"], *(item["answers"][name]["text"] for name in names)] for item in prompts]
            found["report/prompts"] = wandb.Table(["prompt", *names], answered)
        if html is not None:
            found["report/page"] = wandb.Html(html.read_text(encoding="utf-8"), inject=False)
            report = wandb.Artifact(f"{logger.experiment.id}-report", type="report")
            for name in own_files(html.parent):  # add_dir would print
                report.add_file(str(html.parent / name), name=name)
            logger.experiment.log_artifact(report)
        logger.experiment.log(found)
        for key, value in figures.items():
            logger.experiment.summary[key] = value
    except Exception as error:
        logger.give_up(error)


def finish(logger: SafeLogger | None) -> str | None:
    """Close the run.

    Returns:
        The command that uploads the remaining data (``wandb sync FOLDER``), or None if everything is uploaded.
    """
    if logger is None or logger.sync_folder is None:
        return None
    left = None
    try:
        import wandb

        run: Any = logger._experiment
        offline = bool(run.offline)
        left = f"wandb sync {logger.sync_folder}" if offline or logger.broken else None
        run.finish()
        wandb.teardown()  # all bytes are on the disk only after its service has ended
    except Exception as error:
        logger.give_up(error)
        left = f"wandb sync {logger.sync_folder}"
    return left


def own_files(folder: Path) -> list[str]:
    """Paths within a folder of its files, hidden ones and links left out: a link may lead to anything."""
    whole = folder.resolve()
    return [name for name in files_of(folder) if (folder / name).resolve() == whole / name]


def _first_rank() -> bool:
    return getattr(rank_zero_only, "rank", 0) in (0, None)


def _line(error: Exception) -> str:
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _warn(text: str) -> None:
    logging.getLogger("distill").warning(redacted(text))
