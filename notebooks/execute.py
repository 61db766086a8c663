"""Runs the notebooks and keeps their outputs, with small pictures: ``python notebooks/execute.py [NAME...]``.

``DISTILL_RUN`` is the run that ``read_a_run`` reads, ``DISTILL_CHAT_MODEL`` the chat model of ``05_chat_and_tasks``.
"""

from __future__ import annotations

import base64
import io
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

FOLDER = Path(__file__).parent
COLOURS = 48
"""Colours of a kept picture; plots need few."""


def main() -> None:
    """Run the notebooks that are named, or all of them."""
    for file in sorted(FOLDER.glob("*.ipynb")):
        if len(sys.argv) > 1 and file.stem not in sys.argv[1:]:
            continue
        notebook = nbformat.read(file, as_version=4)
        NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(FOLDER.parent)}}).execute()
        for cell in notebook.cells:
            cell.metadata = {}
            cell.outputs = [_small(output) for output in cell.get("outputs", []) if output.get("name") != "stderr"]
            if cell.cell_type != "code":
                del cell["outputs"]
        notebook.metadata = {key: notebook.metadata[key] for key in ("kernelspec", "language_info")}
        notebook.metadata["language_info"] = {"name": "python"}
        nbformat.write(notebook, file)
        print(f"{file.name}: {file.stat().st_size / 1e3:.0f} kB")


def _small(output: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """An output without paths of this machine, and its picture with few colours."""
    for holder in (output, output.get("data", {})):
        for key in ("text", "text/plain", "text/html"):
            if isinstance(holder.get(key), str):
                holder[key] = re.sub(r"/(?:tmp|home|root)/[^\s'\"]*/", ".../", holder[key])
    data = output.get("data", {})
    if "image/png" in data:
        picture = Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).convert("RGB")
        picture.thumbnail((1000, 1000))
        kept = io.BytesIO()
        picture.quantize(COLOURS).save(kept, "png", optimize=True)
        data["image/png"] = base64.b64encode(kept.getvalue()).decode()
    return output


if __name__ == "__main__":
    main()
