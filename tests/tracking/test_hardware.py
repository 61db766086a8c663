"""What a run takes of the machine: counters that are there and that are not, the log, its sums, and the live view."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from rich.console import Console

from distill.core.errors import InputError
from distill.core.run_folder import Run
from distill.reporting.machine_load import load_plot, usage_table
from distill.tracking.counters import Counters
from distill.tracking.hardware import SAMPLES, HardwareLog, Samples, read_samples
from distill.tracking.spec import Price
from distill.tracking.usage import usages
from distill.watch import is_live, sparkline, stage_views, view, watch
from tests.faults.damage import damage_material


class Nvml:
    """Stands for pynvml on a machine of two GPUs; each look at the energy adds 500 J to one and 250 J to the other."""

    NVML_TEMPERATURE_GPU = 0

    def __init__(self, **refused: bool):
        self.refused, self.millijoules, self.is_open = refused, [10_000_000, 20_000_000], False

    def nvmlInit(self) -> None:
        if self.refused.get("driver"):
            raise RuntimeError("NVML Shared Library Not Found")
        self.is_open = True

    def nvmlShutdown(self) -> None:
        self.is_open = False

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return f"GPU-{handle}{handle}"

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:
        return SimpleNamespace(gpu=80 + handle)

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        return SimpleNamespace(used=10**9 * (handle + 1), total=80 * 10**9)

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        return 350_000

    def nvmlDeviceGetTemperature(self, handle: int, kind: int) -> int:
        return 60

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:
        if self.refused.get("energy"):
            raise RuntimeError("Not Supported")
        self.millijoules[handle] += (500_000, 250_000)[handle]
        return self.millijoules[handle]


@pytest.fixture
def rapl(tmp_path: Path) -> Callable[[int], Path]:
    """A counter of one package, set to so many microjoules; it wraps at 1,000,000."""
    package = tmp_path / "powercap" / "intel-rapl:0"
    package.mkdir(parents=True)
    (package / "max_energy_range_uj").write_text("999999\n")

    def put(microjoules: int) -> Path:
        (package / "energy_uj").write_text(f"{microjoules}\n")
        return package.parent

    return put


def test_two_gpus_and_a_package(rapl: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    nvml = Nvml()
    counters = Counters(nvml, rapl(900_000))
    first = counters.sample()
    rapl(100_000)  # it has wrapped around once
    second = counters.sample()
    assert [gpu["index"] for gpu in first["gpus"]] == [0, 1]
    assert first["gpus"][1] | {"joules": 0} == {
        "joules": 0,
        "index": 1, "utilization": 81, "memory": 2e9, "memory_total": 80e9, "power": 350, "temperature": 60,
    }  # fmt: skip
    assert second["joules"]["gpu"] - first["joules"]["gpu"] == 750
    assert second["joules"]["cpu"] - first["joules"]["cpu"] == pytest.approx(0.2)
    assert first["memory"] > 10**7
    counters.close()
    assert not nvml.is_open


@pytest.mark.parametrize(("visible", "indices"), [("1", [1]), ("GPU-00", [0]), ("1,0", [1, 0]), ("", []), ("-1", [])])
def test_only_the_gpus_that_this_process_may_use(
    visible: str, indices: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    sample = Counters(Nvml(), tmp_path).sample()
    assert [gpu["index"] for gpu in sample.get("gpus", [])] == indices


def test_what_cannot_be_read_is_not_there_and_never_guessed(tmp_path: Path) -> None:
    assert Counters(Nvml(driver=True), tmp_path).sample().keys() == {"cpu", "memory", "memory_used"}
    sample = Counters(Nvml(energy=True), tmp_path).sample()
    assert "joules" not in sample
    assert "joules" not in sample["gpus"][0]
    assert usages([{"at": 0, "stage": "train", **sample}])[0].energy() == "not measured"


def test_the_log_of_this_machine(tmp_path: Path) -> None:
    log = HardwareLog(tmp_path / SAMPLES, every_s=0.02)
    log.start()
    with log.of("train"):
        while len([s for s in read_samples(tmp_path) if s["stage"] == "train"]) < 3:
            time.sleep(0.01)
    log.stop()
    with (tmp_path / SAMPLES).open("a") as stream:
        stream.write('{"at": 1, "st')  # a kill
    (train,) = usages(read_samples(tmp_path))
    assert train.stage == "train"
    assert train.seconds > 0
    assert train.memory_bytes > 10**7


def test_the_load_is_of_all_processors_and_the_memory_of_this_process_and_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter([(100.0, 10.0), (140.0, 40.0)])  # of all processors: in all, and at work
    monkeypatch.setattr("distill.tracking.counters._cpu_seconds", lambda: next(seconds))
    process = lambda memory: SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=memory))  # noqa: E731
    own = SimpleNamespace(memory_info=process(5).memory_info, children=lambda recursive: [process(20), process(300)])
    monkeypatch.setattr("distill.tracking.counters.psutil.Process", lambda: own)
    found = Counters(Nvml(driver=True), tmp_path).sample()
    assert (found["cpu"], found["memory"]) == (75.0, 325)


@pytest.mark.parametrize("is_on", [True, False])
def test_a_recipe_may_switch_it_off(is_on: bool, tmp_path: Path) -> None:
    from distill.recipe import Recipe
    from distill.runner import run

    teacher, text = damage_material(tmp_path)
    data = {"train": {"kind": "jsonl", "path": str(text)}, "sequence_length": 16, "validation_tokens": 60}
    logging = {"wandb": "disabled", "hardware": is_on, "price": {"per_hour": 3, "currency": "EUR"}}
    stages = {"prune": {"keep": {"intermediate_size": "50%"}}, "evaluate": {"speed": None}, "report": {"prompts": []}}
    content = {"name": "quiet", "teacher": str(teacher), "data": data, "stages": stages, "logging": logging}
    folder = run(Recipe.model_validate(content), tmp_path / "run", say=lambda line: None).folder
    assert (folder / SAMPLES).exists() is is_on
    assert ("memory (rank 0)" in (folder / "report" / "report.md").read_text()) is is_on


def test_a_line_is_written_every_second(tmp_path: Path) -> None:
    assert HardwareLog(tmp_path / SAMPLES)._every_s == 1.0


def test_a_log_that_cannot_be_written_ends_no_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = HardwareLog(tmp_path / "no-folder" / SAMPLES, every_s=0.01)
    log.start()
    log.stop()
    assert "not written any more" in capfd.readouterr().err


def sample(at: float, stage: str, session: str = "1", **more: Any) -> dict[str, Any]:
    return {"at": at, "stage": stage, "session": session, "cpu": 50.0, "memory": 10**9, **more}


def test_sums_of_a_stage_over_two_calls() -> None:
    samples = [
        sample(0, "", joules={"gpu": 100.0}),
        sample(1, "train", joules={"gpu": 150.0}, gpus=[{"index": 0, "utilization": 90, "memory": 5 * 10**9}]),
        sample(2, "train", joules={"gpu": 250.0}, gpus=[{"index": 0, "utilization": 70, "memory": 6 * 10**9}]),
        sample(500, "train", "2", joules={"gpu": 3.0}),  # another call, whose counter begins anew
        sample(501, "train", "2", joules={"gpu": 13.0}),
        sample(502, "evaluate", "2", joules={"gpu": 14.0}),
    ]
    train, evaluate = usages(samples)
    assert (train.seconds, train.joules, train.gpu, train.gpu_memory_bytes) == (3, {"gpu": 160.0}, 80, 6 * 10**9)
    assert (evaluate.seconds, evaluate.joules) == (1, {"gpu": 1.0})
    table = usage_table([train, evaluate], Price(per_hour=36, currency="EUR"))
    assert table[0] == [
        "stage",
        "time",
        "CPU load",
        "memory (rank 0)",
        "GPU load",
        "GPU memory",
        "energy",
        "cost",
    ]
    assert table[1] == ["train", "3 s", "50 %", "1.00 GB", "80 %", "6.0 GB", "160 J (GPU)", "0.03 EUR"]
    assert "cost" not in usage_table([train], None)[0]


def test_a_counter_that_fails_now_and_then_and_a_clock_that_is_set_back() -> None:
    samples = [
        sample(0, "", joules={"gpu": 0.0}),
        sample(1, "train"),  # not read this once: what it rose by is in the next
        sample(2, "train", joules={"gpu": 30.0}),
        sample(-50, "train", joules={"gpu": 40.0}),
        sample(-48, "train", cpu=20.0, gpus=[{"index": 0}, {"index": 1}]),
    ]
    (train,) = usages(samples)
    assert (train.joules, train.seconds, train.device_seconds) == ({"gpu": 40.0}, 4, 6)
    assert train.cpu == 35  # two seconds at 50 % and two at 20 %
    assert train.cost(Price(per_hour=3600, currency="EUR", per="device")) == "6.00 EUR"


@pytest.mark.parametrize(("per", "cost"), [("machine", "2.00 EUR"), ("device", "4.00 EUR")])
def test_a_price_is_of_the_machine_or_of_each_of_its_gpus(per: Any, cost: str) -> None:
    gpus = [{"index": 0}, {"index": 1}]
    (train,) = usages([sample(float(at), "train", gpus=gpus) for at in range(3)])
    assert train.cost(Price(per_hour=3600, currency="EUR", per=per)) == cost


def test_a_short_stage_has_its_own_samples(tmp_path: Path) -> None:
    log = HardwareLog(tmp_path / SAMPLES, every_s=3600)
    log.start()
    for stage in ("first", "second"):
        with log.of(stage):
            time.sleep(0.05)
    log.stop()
    assert [one["stage"] for one in read_samples(tmp_path)] == ["", "", "first", "", "second", ""]
    assert all(0.04 <= one.seconds < 2 for one in usages(read_samples(tmp_path)))


def test_a_sample_that_never_returns_holds_up_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stuck(Counters):
        def sample(self) -> dict[str, Any]:
            is_free.wait(20)
            return {}

    is_free = threading.Event()
    monkeypatch.setattr("distill.tracking.hardware.PATIENCE_S", 0.05)
    log = HardwareLog(tmp_path / SAMPLES, Stuck(), every_s=0.01)
    began = time.monotonic()
    log.start()
    for stage in ("first", "second"):
        with log.of(stage):
            pass
    log.stop()
    assert time.monotonic() - began < 5
    is_free.set()


def test_only_what_was_added_is_read(tmp_path: Path) -> None:
    samples, file = Samples(tmp_path), tmp_path / SAMPLES
    assert samples.read() == []
    file.write_text(json.dumps(sample(1, "a")) + "\n" + '{"at": 2, "st')
    assert [one["at"] for one in samples.read()] == [1]
    with file.open("a") as stream:
        stream.write('age": "a"}\n')
    assert [one["at"] for one in samples.read()] == [1, 2]
    file.write_text(json.dumps(sample(3, "a")) + "\n")  # another file
    assert [one["at"] for one in samples.read()] == [3]


@pytest.mark.plots
def test_a_plot_of_the_load() -> None:
    samples = [sample(float(i), "train", gpus=[{"index": 0, "utilization": i % 100}]) for i in range(900)]
    plot = load_plot(samples)
    assert plot is not None
    assert ">GPU<" in plot.svg
    assert load_plot(samples[:5]) is None


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run whose first stage is done and whose second one trains."""
    budget = {"num_tokens": 1000, "batch_size": 2}
    stages = {
        "base": {"kind": "finetune", "model": "x/y", **budget},
        "student": {"kind": "finetune", "model": "base", **budget},
    }
    data = {"train": {"kind": "python_docs"}, "sequence_length": 16, "tokenizer": {"vocab_size": 300}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"name": "watched", "data": data, "stages": stages}))
    run = Run(tmp_path)
    run.begin("base", "hash")
    run.finish("base", "hash", 65.0, {})
    folder = run.begin("student", "hash")
    rows = [
        {"step": s, "tokens": 25 * s, "train/kl": 5.0 / s, "perf/tokens_per_s": 50.0, "perf/steps_per_s": 2.0}
        for s in (5, 10, 20)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def shown(folder: Path) -> str:
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(view(folder, read_samples(folder)))
    return console.export_text()


def test_the_view_of_a_run_that_works(run_folder: Path) -> None:
    gpu = {"index": 3, "utilization": 97, "memory": 70e9, "memory_total": 80e9, "power": 650.0, "temperature": 61}
    lines = [sample(time.time() - 10 + i, "student", gpus=[gpu]) for i in range(10)]
    (run_folder / SAMPLES).write_text("".join(json.dumps(line) + "\n" for line in lines))
    with Run(run_folder).lock():
        text = shown(run_folder)
    assert "✓  base     (finetune)  1:05" in text
    # 1,000 tokens at 25 per step are 40 steps; 20 steps at 2 per second are 10 s
    assert "step 20 of 40, 0:10 left" in text
    assert "train/kl" in text
    assert "0.25" in text
    assert "97 %" in text
    assert "70.0 of 80.0 GB, 650 W, 61 °C" in text


def test_one_view_of_a_run_that_goes_on(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.watch.time.sleep", lambda seconds: pytest.fail("waits for a second view"))
    (run_folder / SAMPLES).write_text(json.dumps(sample(time.time(), "student")) + "\n")
    with Run(run_folder).lock(), open("/dev/null", "w") as nowhere:
        console = Console(width=100, record=True, file=nowhere)
        watch(run_folder, once=True, console=console)
    assert console.export_text().count("step 20 of 40") == 1


def test_ctrl_c_ends_the_view_and_nothing_else(run_folder: Path, as_on_a_terminal: None) -> None:
    (run_folder / SAMPLES).write_text(json.dumps(sample(time.time(), "student")) + "\n")
    ours, its = os.openpty()
    with Run(run_folder).lock():
        viewer = subprocess.Popen([sys.executable, "-m", "distill", "watch", str(run_folder)], stdout=its, stderr=its)
        os.close(its)
        said = os.read(ours, 1)  # it has begun to draw
        viewer.send_signal(signal.SIGINT)
        with suppress(OSError):  # the terminal's other end is closed
            while piece := os.read(ours, 1000):
                said += piece
    assert viewer.wait(60) == 0
    assert b"the same command goes on" not in said


def test_the_view_of_a_run_that_was_stopped_and_of_no_run(run_folder: Path, tmp_path: Path) -> None:
    from distill.recipe import Recipe

    (run_folder / SAMPLES).write_text(json.dumps(sample(time.time(), "student")) + "\n")  # it was stopped just now
    recipe = Recipe.load(run_folder / "recipe.yaml")
    views = stage_views(recipe, Run(run_folder), read_samples(run_folder))
    assert [(one.state, one.left_s()) for one in views] == [("done", None), ("stopped", None)]
    watch(run_folder, console=Console(file=open("/dev/null", "w")))  # noqa: SIM115 - ends by itself
    with pytest.raises(InputError, match=r"not a run folder \(no recipe.yaml in it\)"):
        watch(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("owner", "is_worked_at"),
    [("process 999999999 on here", False), ("process PID on here", True), ("process PID on elsewhere", None),
     ("", False)],
)  # fmt: skip
def test_a_run_is_live_while_its_process_is(
    owner: str, is_worked_at: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "here")
    (tmp_path / ".lock").write_text(owner.replace("PID", str(os.getpid())))
    assert Run(tmp_path).is_worked_at() is is_worked_at
    assert is_live(Run(tmp_path), [sample(time.time(), "train")]) is (is_worked_at is not False)
    assert is_live(Run(tmp_path), [sample(time.time() - 3600, "train")]) is (is_worked_at is True)
    os.utime(tmp_path / ".lock", (1, 1))  # taken before the process that has the number now was there
    assert Run(tmp_path).is_worked_at() is (None if is_worked_at is None else False)


def test_sparklines() -> None:
    assert sparkline([0, 7]) == "▁█"
    assert sparkline([5, 5, 5]) == "▁▁▁"
    assert sparkline([0, float("nan"), 1]) == "▁ █"
    assert len(sparkline(list(range(1000)))) == 40
    assert sparkline([50], 0, 100) == "▅"
    assert sparkline([]) == ""
