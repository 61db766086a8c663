"""Every verb of the command line that takes a path, which stands as PATH in it."""

from __future__ import annotations

VERBS = [
    ["run", "PATH"],
    ["run", "quickstart", "--run-dir", "PATH"],
    ["check", "PATH"],
    ["resume", "PATH"],
    ["report", "PATH"],
    ["compare", "PATH", "--prompt", "x"],
    ["compare", "x", "--prompts", "PATH"],
    ["watch", "PATH", "--once"],
    ["cache", "info", "PATH"],
    ["cache", "verify", "PATH"],
    ["data", "PATH"],
    ["schema", "PATH"],
    ["init", "PATH"],
    ["init", "--out", "PATH"],
    ["prune", "PATH", "--keep", "layers=1"],
    ["quantize", "PATH"],
    ["export", "PATH", "--target", "gguf"],
    ["evaluate", "PATH"],
]
WITHOUT_A_PATH = {"doctor", "list"}
"""The other verbs."""
