"""Cuts a model with other libraries for ``real_models``, each in its own environment, and records what came of it.

Each attempt is a process with a time limit, in a virtual environment that holds the library, PyTorch and transformers.
What a library needs to know (sizes, calibration tokens) is in a file, so that all have the same. The outcome is the
last line of the output. If a library returns a changed module with the old config, the weights are copied, strictly,
to a model of the new sizes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.real_model_cuts import PEERS
from distill.pretrained import config_from, model_from, model_of, tokenizer_from

ROOT = Path(__file__).parents[1]
TIME_LIMIT_S = 3600
BATCH_SIZE = 4
TORCH = "torch==2.13.0"
PACKAGES: dict[str, tuple[str, ...]] = {
    "optipfair": (TORCH, "transformers", "optipfair==0.4.2"),
    "torch-pruning": (TORCH, "transformers", "torch-pruning==1.6.1"),
    "soup": (TORCH, "transformers", "soup-cli==0.77.0"),
    "model-optimizer": (TORCH, "transformers", "nvidia-modelopt==0.47.0", "requests"),
}
"""Environment -> what pip installs in it, together, so that no other PyTorch is fetched."""
RECORD, ASKED = "peer.json", "asked.json"


@dataclass(frozen=True)
class Peer:
    """An attempt.

    Attributes:
        outcome: the last line that it printed, or that the time was up.
        folder: of the model, if there is one.
    """

    outcome: str
    folder: Path | None = None


@dataclass(frozen=True)
class Asked:
    """What a library is told.

    Attributes:
        model: folder of the model to cut.
        calibration: JSON file with token ids, [sequences][tokens].
        intermediate_size: MLP neurons per layer to keep, for contenders that cut width.
        num_hidden_layers: layers to keep, for contenders that cut depth.
    """

    model: str
    calibration: str
    intermediate_size: int
    num_hidden_layers: int

    def loaded(self) -> Any:
        """The model in float32."""
        from transformers import AutoModelForCausalLM

        return model_from(self.model, AutoModelForCausalLM, dtype="float32").eval()

    def batches(self) -> list[Any]:
        """Calibration tokens, int64 [BATCH_SIZE, tokens] each."""
        import torch

        rows = json.loads(Path(self.calibration).read_text(encoding="utf-8"))
        return list(torch.tensor(rows).split(BATCH_SIZE))


def environment(name: str, folder: Path) -> Path:
    """The Python of a peer's environment, which is made if it is not there.

    Args:
        name: key of PACKAGES.
        folder: of the environments.

    Raises:
        subprocess.CalledProcessError: pip cannot install the packages.
    """
    python = folder / name / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder / name)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *PACKAGES[name]], check=True)
    return python


def attempt(name: str, asked: Asked, folder: Path, environments: Path) -> Peer:
    """Cut a model once, in a process of the peer's environment.

    Args:
        name: of the contender.
        asked: what the library is told.
        folder: of the attempt; a recorded attempt is not made again.
        environments: folder of the environments.
    """
    record, model = folder / RECORD, folder / "model"
    if not record.is_file():
        shutil.rmtree(model, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ASKED).write_text(json.dumps(asdict(asked), indent=2), encoding="utf-8")
        outcome = _outcome(name, folder, environments)
        record.write_text(json.dumps({"outcome": outcome}, indent=2), encoding="utf-8")
    outcome = json.loads(record.read_text(encoding="utf-8"))["outcome"]
    return Peer(outcome, model if (model / "config.json").is_file() else None)


def _outcome(name: str, folder: Path, environments: Path) -> str:
    try:
        python = environment(PEERS[name], environments)
    except subprocess.CalledProcessError as error:
        return f"pip cannot install {' '.join(PACKAGES[PEERS[name]])} (exit code {error.returncode})"
    command = [str(python), "-m", "benchmarks.real_model_peers", "--one", name, str(folder)]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=TIME_LIMIT_S,
            check=False,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return f"no result in {TIME_LIMIT_S} s"
    printed = [line for line in (done.stdout if done.returncode == 0 else done.stderr).splitlines() if line.strip()]
    said = printed[-1] if printed else f"exit code {done.returncode} and nothing printed"
    return said.replace(str(folder), "FOLDER")


def _optipfair_width(asked: Asked) -> Any:
    """Its data-driven method: weights and activations (MAW with a dataloader)."""
    import optipfair

    model = asked.loaded()
    removed = 100 * (1 - asked.intermediate_size / model.config.intermediate_size)
    return optipfair.prune_model(
        model,
        pruning_type="MLP_GLU",
        neuron_selection_method="MAW",
        pruning_percentage=removed,
        dataloader=[{"input_ids": batch} for batch in asked.batches()],
        show_progress=False,
    )


def _optipfair_depth(asked: Asked) -> Any:
    """The layers of lowest importance by its analysis, which compares their inputs and outputs."""
    import optipfair

    model = asked.loaded()
    batches = [{"input_ids": batch} for batch in asked.batches()]
    importance = optipfair.analyze_layer_importance(model, batches, show_progress=False)
    num_removed = model.config.num_hidden_layers - asked.num_hidden_layers
    lowest = sorted(importance, key=importance.__getitem__)[:num_removed]
    return optipfair.prune_model(
        model, pruning_type="DEPTH", layer_indices=sorted(lowest), layer_selection_method="custom", show_progress=False
    )


def _torch_pruning(asked: Asked) -> Any:
    """MLP neurons by the Taylor importance of groups."""
    import torch_pruning

    model = asked.loaded()
    model.config.use_cache = False  # otherwise tracing does not end
    ratio = 1 - asked.intermediate_size / model.config.intermediate_size
    layers = list(model.model.layers)
    attention = [p for x in layers for p in (x.self_attn.q_proj, x.self_attn.k_proj, x.self_attn.v_proj)]
    pruner = torch_pruning.pruner.BasePruner(
        model,
        example_inputs=asked.batches()[0][:1],
        importance=torch_pruning.importance.GroupTaylorImportance(),
        pruning_ratio=0.0,
        pruning_ratio_dict={p: ratio for layer in layers for p in (layer.mlp.gate_proj, layer.mlp.up_proj)},
        ignored_layers=[model.lm_head, *attention],
        output_transform=lambda out: out.logits,
    )
    for batch in asked.batches():
        model(input_ids=batch, labels=batch).loss.backward()
    pruner.step()
    return plain(model, asked)


def _soup(asked: Asked) -> Any:
    """The block of neighbouring layers that `soup shrink` drops, without its own training."""
    from soup_cli.utils.shrink import compute_layer_importance, prune_model_layers, select_drop_block

    model, tokenizer = asked.loaded(), tokenizer_from(asked.model)
    texts = [tokenizer.decode(row) for batch in asked.batches() for row in batch]
    num_removed = model.config.num_hidden_layers - asked.num_hidden_layers
    scores = compute_layer_importance(model, tokenizer, texts, block_size=num_removed, device="cpu")
    chosen = select_drop_block(scores)
    prune_model_layers(model, chosen.start, chosen.block_size)
    return model


def _model_optimizer(asked: Asked) -> Any:
    """Minitron's width by the activations of its calibration loop."""
    import modelopt.torch.prune

    model = asked.loaded()

    def forward(pruned: Any) -> None:
        for batch in asked.batches():
            pruned(input_ids=batch)

    pruned, _ = modelopt.torch.prune.prune(
        model,
        mode="mcore_minitron",
        constraints={"export_config": {"ffn_hidden_size": asked.intermediate_size}},
        dummy_input=asked.batches()[0][:1],
        config={"forward_loop": forward},
    )
    return plain(pruned, asked)


def plain(model: Any, asked: Asked) -> Any:
    """A model with a config of the new sizes, and the weights of ``model``, strictly."""
    from transformers import AutoModelForCausalLM

    old = model.config.to_dict()
    config = type(model.config)(**{**old, "intermediate_size": asked.intermediate_size, "use_cache": True})
    fresh = model_of(config, AutoModelForCausalLM)
    fresh.load_state_dict(model.state_dict(), strict=True)
    return fresh


ATTEMPTS: dict[str, Callable[[Asked], Any]] = {
    "optipfair width": _optipfair_width,
    "optipfair depth": _optipfair_depth,
    "Torch-Pruning width": _torch_pruning,
    "soup shrink": _soup,
    "Model-Optimizer width": _model_optimizer,
}
"""Contender -> function that returns a cut transformers model."""


def main() -> None:
    """Make one attempt, in the environment of its library."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--one", nargs=2, metavar=("NAME", "FOLDER"), required=True)
    name, folder = parser.parse_args().one
    asked = Asked(**json.loads((Path(folder) / ASKED).read_text(encoding="utf-8")))
    model = ATTEMPTS[name](asked)
    temporary = Path(folder) / "model.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    model.to(config_from(asked.model).dtype).save_pretrained(temporary)  # as distill stores what it has cut
    for file in [*Path(asked.model).glob("*token*.json"), *Path(asked.model).glob("*.jinja")]:
        shutil.copy(file, temporary)
    temporary.rename(Path(folder) / "model")
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    main()
