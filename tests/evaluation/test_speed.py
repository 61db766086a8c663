"""Speed comes from a process of its own, or not at all. No test asserts a time."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from distill.core.errors import InputError, MachineError
from distill.core.threads import affine
from distill.evaluation.speed import Point, Speed, measure_speed, quietest
from distill.evaluation.speed_settings import SpeedSettings
from distill.tracking.counters import Counters

QUICK = {"prompt_tokens": 8, "new_tokens": 3, "repeats": 2, "threads": 1}
FIGURES = (
    "prefill_ms_p50", "prefill_ms_p90", "prefill_tokens_per_s", "decode_tokens_per_s_p50", "decode_tokens_per_s_p90",
    "peak_memory_bytes", "memory_above_start_bytes",
)  # fmt: skip


def test_figures_hang_together(tiny_folders: list[Path]) -> None:
    grid = ((2, 8), (1, 24))
    speed = measure_speed(tiny_folders[0], batch=2, dtype="float32", grid=grid, counters=Counters, energy_s=0, **QUICK)
    assert [(point.batch, point.prompt_tokens) for point in speed.points] == [(2, 8), (1, 24)]
    assert speed.points[0].decode_tokens_per_s_p50 == speed.decode_tokens_per_s_p50
    assert speed.points[1].prefill_tokens_per_s == pytest.approx(24 / speed.points[1].prefill_ms_p50 * 1e3)
    assert (speed.decode_joules_per_1000 is None) == (not Counters().joules()), "as this machine has a counter or not"
    assert speed.cpu_load > 0
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


@pytest.mark.exhaustive
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
        Speed("real", "engine", SpeedSettings(), "cpu", decode_tokens_per_s_p50=value, peak_memory_bytes=7,
              decode_joules_per_1000=value, points=(Point(1, 8, 200 / value, 300 / value, value, 7),))
        for value in (100.0, 10.0, 90.0)
    ]  # fmt: skip
    together = quietest(rounds)
    assert together.decode_joules_per_1000 == 90.0, "of energy the median: other work adds to it and may end before it"
    assert (together.points[0].prefill_ms_p50, together.points[0].prefill_tokens_per_s) == (2.0, 100.0)
    assert (together.decode_tokens_per_s_p50, together.peak_memory_bytes, together.prefill_ms_p50) == (100.0, 7, None)
    simulated = Speed("simulated", "engine", SpeedSettings(), "cpu")
    assert quietest([simulated, simulated]) == simulated


@pytest.mark.parametrize("weights", ["stored", "random"])
def test_code_beside_the_model_is_not_run(weights: str, tiny_folders: list[Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folders[0], tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "mine", "auto_map": own}))
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(MachineError, match="contains custom code which must be executed"):
        measure_speed(folder, weights=weights, **QUICK)
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="GNU's OpenMP library says what it has read")
def test_what_distill_has_chosen_for_training_does_not_change_a_speed(tiny_folders: list[Path], tmp_path: Path) -> None:
    """As in the first of several processes, which computes on a part of the CPUs."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os; os.environ |= {'OMP_NUM_THREADS': '1', 'OMP_WAIT_POLICY': 'PASSIVE'}\n"
        "os.environ['DISTILL_CHOSE'] = 'OMP_NUM_THREADS,OMP_WAIT_POLICY'\n"
        "import torch; from distill.evaluation.speed import measure_speed\n"
        f"speed = measure_speed({str(tiny_folders[1])!r}, **{QUICK | {'threads': None}!r})\n"
        "print(torch.get_num_threads(), speed.threads, os.environ['OMP_NUM_THREADS'])\n"
    )
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": "/usr/bin:/bin", "OMP_DISPLAY_ENV": "VERBOSE"}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True, env=environment)
    numbers = re.findall(r"OMP_NUM_THREADS\s*=\s*'(\d+)", done.stderr)
    spins = re.findall(r"GOMP_SPINCOUNT\s*=\s*'(\d+)", done.stderr)
    assert (numbers[0], spins[0]) == ("1", "0")
    assert (numbers[1], spins[1]) == (str(affine()), "300000"), "the measuring process has what PyTorch has by itself"
    assert done.stdout.split()[::2] == ["1", "1"], "and ours stays as it was"


def test_what_measures_ends_with_the_run(tiny_folders: list[Path]) -> None:
    """Else it would disturb what the same command measures when it goes on."""
    code = "import sys; from distill.evaluation.speed import measure_speed; measure_speed(sys.argv[1], repeats=10**9)"
    process = subprocess.Popen([sys.executable, "-c", code, str(tiny_folders[1])])
    until = time.monotonic() + 120
    # the server that it is forked from has a parent of its own
    while not (busy := [p for p in psutil.Process(process.pid).children(True) if p.ppid() != process.pid]):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.1)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(busy, timeout=60)
    for child in alive:
        child.kill()
    assert alive == []
