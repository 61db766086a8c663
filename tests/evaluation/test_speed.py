"""Speed comes from a process of its own, or not at all. No test asserts a time."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from distill.core.errors import InputError, MachineError
from distill.evaluation.speed import Speed, measure_speed, quietest
from distill.evaluation.speed_settings import SpeedSettings

QUICK = {"prompt_tokens": 8, "new_tokens": 3, "repeats": 2, "threads": 1}
FIGURES = (
    "prefill_ms_p50", "prefill_ms_p90", "prefill_tokens_per_s", "decode_tokens_per_s_p50", "decode_tokens_per_s_p90",
    "peak_memory_bytes", "memory_above_start_bytes",
)  # fmt: skip


def test_figures_hang_together(tiny_folders: list[Path]) -> None:
    speed = measure_speed(tiny_folders[0], batch=2, dtype="float32", **QUICK)
    for name in FIGURES:
        assert getattr(speed, name) > 0, name
    assert speed.prefill_ms_p90 >= speed.prefill_ms_p50
    assert speed.decode_tokens_per_s_p90 <= speed.decode_tokens_per_s_p50
    assert speed.prefill_tokens_per_s == pytest.approx(2 * 8 / speed.prefill_ms_p50 * 1e3)
    assert speed.peak_memory_bytes > speed.memory_above_start_bytes
    assert (speed.kernel, speed.dtype, speed.threads, speed.device) == ("real", "float32", 1, "cpu")
    assert "transformers" in speed.engine
    assert measure_speed(tiny_folders[0], **QUICK).dtype == "bfloat16"


def test_a_config_alone_is_measured_on_random_weights(tiny_folders: list[Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((tiny_folders[0] / "config.json").read_text())
    speed = measure_speed(tmp_path, weights="random", **QUICK)
    assert speed.decode_tokens_per_s_p50 > 0
    assert speed.dtype == "bfloat16"
    with pytest.raises(MachineError):
        measure_speed(tmp_path, **QUICK)


def test_a_simulated_kernel_has_no_figures() -> None:
    speed = measure_speed("/no/such/model", kernel="simulated", **QUICK)
    assert all(getattr(speed, name) is None for name in FIGURES)
    assert dataclasses.asdict(speed)["kernel"] == "simulated"


def test_the_process_s_error_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(MachineError) as caught:
        measure_speed(tmp_path, **QUICK)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(("setting", "value"), [("repeats", 0), ("new_tokens", 0), ("dtype", "int3")])
def test_settings_without_sense(setting: str, value: object) -> None:
    with pytest.raises(InputError, match=setting):
        measure_speed("x", **{**QUICK, setting: value})


def test_an_unguarded_script_is_not_run_twice(tiny_folders: list[Path], tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "print('script runs')\nfrom distill.evaluation.speed import measure_speed\n"
        f"print(measure_speed({str(tiny_folders[1])!r}, **{QUICK!r}).kernel)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True, cwd=Path.cwd(),
                          env={"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": "/usr/bin:/bin"})  # fmt: skip
    assert done.stdout.split("\n")[:2] == ["script runs", "real"]


def test_the_least_disturbed_round_is_what_counts() -> None:
    rounds = [
        Speed("real", "engine", SpeedSettings(), "cpu", decode_tokens_per_s_p50=value, peak_memory_bytes=7)
        for value in (100.0, 10.0, 90.0)
    ]
    together = quietest(rounds)
    assert (together.decode_tokens_per_s_p50, together.peak_memory_bytes, together.prefill_ms_p50) == (100.0, 7, None)
    simulated = Speed("simulated", "engine", SpeedSettings(), "cpu")
    assert quietest([simulated, simulated]) == simulated
