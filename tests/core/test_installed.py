"""How distill was installed decides the command that adds an extra; packages of the same name are told."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from distill import _refuse_others
from distill.core import installed


def installation(place: Path, name: str, **files: str) -> installed.Distribution:
    """An installed distribution, as its files say."""
    folder = place / f"{name.replace('-', '_')}-1.0.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    for file, text in files.items():
        (folder / file.replace("__", ".")).write_text(text)
    return installed.Distribution.at(folder)


@pytest.mark.parametrize(
    ("files", "prefix", "command"),
    [
        ({"INSTALLER": "pip\n"}, "/venv", "pip install 'distill-lm[onnx]'"),
        ({"INSTALLER": "uv\n"}, "/venv", "uv pip install 'distill-lm[onnx]'"),
        ({"INSTALLER": "uv\n"}, "/home/a/.local/share/uv/tools/x", "uv tool install 'distill-lm[onnx]'"),
        ({"INSTALLER": "pip\n"}, "/home/a/pipx/venvs/distill-lm", "pipx install --force 'distill-lm[onnx]'"),
        (
            {
                "INSTALLER": "pip",
                "direct_url__json": '{"url": "file:///src/my%20distill", "dir_info": {"editable": true}}',
            },
            "/venv",
            "pip install -e '/src/my distill[onnx]'",
        ),
        (
            {"INSTALLER": "uv", "direct_url__json": '{"url": "https://x/y.whl"}'},
            "/venv",
            "uv pip install 'distill-lm[onnx]'",
        ),
    ],
    ids=["pip", "uv", "uv tool", "pipx", "editable", "wheel"],
)
def test_the_command_is_the_installer_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], prefix: str, command: str
) -> None:
    found = installation(tmp_path, "distill-lm", **files)
    monkeypatch.setattr(installed, "_found", lambda: found)
    monkeypatch.setattr(sys, "prefix", prefix)
    assert installed.install_command("onnx") == command


def test_other_packages_of_the_name_are_told_with_the_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = "[console_scripts]\ndistill = other.cli:main\n"
    installation(tmp_path, "distill-anything", entry_points__txt=points)
    installation(tmp_path, "distill-slm", entry_points__txt=points, RECORD="distill/__init__.py,,\n")
    installation(tmp_path, "distill-lm", entry_points__txt=points)
    installation(tmp_path, "plain")
    monkeypatch.setattr(installed, "distributions", lambda: installed.Distribution.discover(path=[str(tmp_path)]))
    monkeypatch.setattr(installed.shutil, "which", lambda name: None)
    first, second = sorted(installed.conflicts())
    assert first.startswith("distill-anything 1.0 also installs the command distill, so one of the two is broken; ")
    assert second.startswith("distill-slm 1.0 also installs the command distill and the import distill, ")
    assert second.endswith("pip uninstall distill-slm, then pip install --force-reinstall --no-deps distill-lm")


def test_mixed_files_are_refused_at_import(tmp_path: Path) -> None:
    _refuse_others(tmp_path)
    installation(tmp_path, "distill-slm")
    with pytest.raises(ImportError, match="pip uninstall -y distill-slm distill-lm && pip install distill-lm"):
        _refuse_others(tmp_path)
