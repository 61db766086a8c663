"""Gathers the pages of the documentation site into ``build/docs``: ``python docs/site.py`` (a part of `make docs`).

The site has the tree of the repository, so that the links between its pages, recipes and sources stay as they are.
Notebooks become pages; a file that a page links to, such as a recipe or a module, is copied beside them. It is also
a hook of MkDocs, which keeps the pages from loading anything from elsewhere.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "docs"
PAGES = ("*.md", "docs/**/*.md", "recipes/README.md", "benchmarks/README.md")
LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")


def main() -> None:
    """Write every page and what it links to."""
    shutil.rmtree(BUILD, ignore_errors=True)
    pages = [page for pattern in PAGES for page in sorted(ROOT.glob(pattern)) if ".venv" not in page.parts]
    for page in pages:
        _write(page.relative_to(ROOT), page.read_text(encoding="utf-8"))
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        _write(notebook.relative_to(ROOT).with_suffix(".md"), "\n".join(_cells(notebook)))
    for file in ("site.css", "offline-worker.js"):
        shutil.copyfile(ROOT / "docs" / file, BUILD / "docs" / file)
    print(f"{BUILD.relative_to(ROOT)}: {len(list(BUILD.rglob('*.md')))} pages")


SHIM = "https://unpkg.com/iframe-worker/shim"
"""What the theme's offline plugin loads for the search in pages that are opened from a folder."""


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Called by MkDocs for each page that it has made."""
    return output.replace(SHIM, "../" * page.url.count("/") + "docs/offline-worker.js")


def _write(place: Path, text: str) -> None:
    """A page, and what it links to; a folder's link leads to its README."""

    def moved(found: re.Match[str]) -> str:
        before, target, after = found.groups()
        if "://" in target or target.startswith("mailto:"):
            return found.group()
        file = (ROOT / place.parent / target).resolve()
        if file.suffix == ".ipynb":
            return f"{before}{target.removesuffix('.ipynb')}.md{after}"
        if file.is_dir():
            return f"{before}{target.rstrip('/')}/README.md{after}"
        if file.is_file() and file.suffix != ".md":
            copy = BUILD / file.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
        return found.group()

    page = BUILD / place
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(LINK.sub(moved, text), encoding="utf-8")


def _cells(file: Path) -> Iterator[str]:
    """The cells of a notebook as Markdown, with the outputs that it was committed with."""
    for number, cell in enumerate(json.loads(file.read_text(encoding="utf-8"))["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            yield f"{source}\n"
            continue
        yield f"```python\n{source}\n```\n"
        for place, output in enumerate(cell.get("outputs", ())):
            yield from _output(output, f"{file.stem}-{number}-{place}")


def _output(output: dict[str, Any], name: str) -> Iterator[str]:
    data = output.get("data", {})
    for kind, suffix in (("image/png", "png"), ("image/webp", "webp")):
        if kind in data:
            picture = BUILD / "notebooks" / "images" / f"{name}.{suffix}"
            picture.parent.mkdir(parents=True, exist_ok=True)
            picture.write_bytes(base64.b64decode("".join(data[kind])))
            yield f"![output of the cell above](images/{picture.name})\n"
            return
    if "text/markdown" in data:
        yield "".join(data["text/markdown"]) + "\n"
    elif text := "".join(output.get("text") or data.get("text/plain") or ()):
        yield f"```text\n{text.rstrip()}\n```\n"


if __name__ == "__main__":
    main()
