"""Weights & Biases, which must never stop a run: a failure costs one line of warning, and the run folder has it all.

The only file of the project that imports wandb.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import netrc
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.loggers.logger import DummyExperiment
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from distill.core.secrets import redacted
from distill.tracking.spec import LoggingSpec
from distill.tracking.tables import COLUMNS, cell, kernel, teacher_first
from distill.tracking.tradeoff import Row

INIT_SECONDS = 15.0
"""How long wandb may take to open a run."""
ANSWER_SECONDS = 5.0
"""How long the host may take to answer before the run is logged offline."""
FINISH_SECONDS = 60.0
"""How long the last upload may take before it is left to ``wandb sync``."""


def guarded(method: Callable[..., Any]) -> Callable[..., Any]:
    """Let a logger's method fail with one line of warning, after which the logger is silent."""

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
        broken: an earlier call failed; nothing more is sent.
        sync_folder: wandb's own folder of this run once it is open.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self._wandb_init.pop("anonymous", None)  # wandb warns about it, and Lightning passes it unasked
        self.broken = False
        self.sync_folder: Path | None = None

    @property
    def experiment(self) -> Any:
        """The wandb run, or a stand-in that swallows everything once wandb has failed."""
        if self.broken:
            return DummyExperiment()
        try:
            return super().experiment
        except Exception as error:
            self.give_up(error)
            return DummyExperiment()

    def open(self) -> Any:
        """The wandb run, opened now; the one method that raises."""
        return super().experiment

    def give_up(self, error: Exception) -> None:
        """Say once what failed and go silent."""
        if not self.broken:
            self.broken = True
            _warn(f"W&B logging stopped, the run goes on ({_line(error)})")

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
    """Open the run at W&B, online or offline, and never fail.

    Args:
        spec: the recipe's ``logging``.
        run_folder: wandb's files go into its ``wandb`` folder.
        run_id: stays the same when a run resumes, so that its curves go on.
        name: the run's display name.
        config: the resolved recipe.

    Returns:
        A logger for Lightning's Trainer, or None when W&B is switched off or cannot even write offline.
    """
    for noisy in ("wandb", "opentelemetry"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    mode = resolve_mode(spec)
    if mode == "disabled":
        return None
    for attempt in dict.fromkeys((mode, "offline")):
        logger = _open(spec, Path(run_folder), run_id, name, config, attempt)
        if logger is not None:
            return logger
    return None


def _open(
    spec: LoggingSpec, folder: Path, run_id: str, name: str, config: Mapping[str, Any], mode: str
) -> SafeLogger | None:
    """One try in one mode; None, with a line of warning, when it failed."""
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
            run = logger.open()
            logger.sync_folder = Path(run.dir).parent
        return logger
    except Exception as error:
        _warn(f"W&B cannot be opened {mode}, the run goes on ({_line(error)})")
        with contextlib.suppress(Exception):
            wandb.teardown()  # else its service holds the run's id, and the next try fails over that
        return None


def resolve_mode(spec: LoggingSpec) -> str:
    """online, offline or disabled. A wish to be online without an answer from the host becomes offline, aloud."""
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
    """The address that wandb itself would use; it has changed before, so none is written here."""
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
    """Whether a web host answers at all within ``seconds``, name look-up and proxy included."""
    heard: list[bool] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(host, timeout=seconds).close()
            heard.append(True)
        except urllib.error.HTTPError:
            heard.append(True)  # an error page is an answer
        except (OSError, ValueError):
            heard.append(False)

    thread = threading.Thread(target=ask, daemon=True)  # a name look-up knows no timeout of its own
    thread.start()
    thread.join(seconds)
    return heard == [True]


def log_tradeoff(
    logger: SafeLogger | None,
    rows: Sequence[Row],
    plots: Mapping[str, Path] | None = None,
    html: Path | None = None,
    prompts: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Send the table, the plots (PNG), the prompts side by side, and the report, as a page and as an artifact.

    Args:
        logger: None does nothing.
        rows: the measured models.
        plots: name -> PNG file.
        html: the report's ``index.html``.
        prompts: as ``evaluation.side_by_side`` returns them.
    """
    if logger is None or logger.broken or not _first_rank():
        return
    try:
        import wandb

        ordered = teacher_first(rows)
        table = [[row.name, row.role, kernel(row), *(cell(row, column) for column in COLUMNS)] for row in ordered]
        found: dict[str, Any] = {
            "report/tradeoff": wandb.Table(["model", "role", "kernel", *(c.header for c in COLUMNS)], table)
        }
        for name, file in (plots or {}).items():
            found[f"report/{name}"] = wandb.Image(str(file))
        if prompts:
            names = list(prompts[0]["answers"])
            answered = [[item["prompt"], *(item["answers"][name]["text"] for name in names)] for item in prompts]
            found["report/prompts"] = wandb.Table(["prompt", *names], answered)
        if html is not None:
            found["report/page"] = wandb.Html(html.read_text(encoding="utf-8"), inject=False)
            report = wandb.Artifact(f"{logger.experiment.id}-report", type="report")
            for file in sorted(html.parent.rglob("*.*")):  # add_dir would print
                if file.is_file():
                    report.add_file(str(file), name=str(file.relative_to(html.parent)))
            logger.experiment.log_artifact(report)
        logger.experiment.log(found)
        for row in ordered:
            for column in COLUMNS:
                if getattr(row, column.key) is not None:
                    logger.experiment.summary[f"{row.name}/{column.key}"] = getattr(row, column.key)
    except Exception as error:
        logger.give_up(error)


def finish(logger: SafeLogger | None) -> str | None:
    """Close the run.

    Returns:
        The line that uploads what is not yet online (``wandb sync FOLDER``), or None when nothing is left to do.
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
        wandb.teardown()  # only its service's end says that every byte is on the disk
    except Exception as error:
        logger.give_up(error)
        left = f"wandb sync {logger.sync_folder}"
    return left


def _first_rank() -> bool:
    return getattr(rank_zero_only, "rank", 0) in (0, None)


def _line(error: Exception) -> str:
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _warn(text: str) -> None:
    logging.getLogger("distill").warning(redacted(text))
