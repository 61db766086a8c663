"""Prunes the same teacher with peers, in a separate environment. If a peer fails, its error message is recorded.

    PYTHONPATH=. WORK/peers-prune/bin/python -m benchmarks.pruning_peers --corpus BOOKS --work WORK

Each attempt is a separate process with a time limit. Torch-Pruning returns a changed module with the old config, so
this script copies its weights to a model with a new config, strictly. The teacher must exist (``benchmarks.books``);
``benchmarks.pruning`` evaluates and trains the models in WORK.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.pruning_cuts import SHAPES
from distill.pretrained import model_from, model_of, tokenizer_from

TIME_LIMIT_S = 180
SEQUENCES, SEQUENCE_LENGTH = 128, 256
"""Size of the calibration set, equal to that of distill."""
RECORD = "peer.json"


@dataclass(frozen=True)
class Peer:
    """An attempt: name, percentage that is kept, outcome, and the folder of the model if there is one."""

    name: str
    share: int
    outcome: str
    folder: Path | None = None


def found(work: Path) -> list[Peer]:
    """The attempts that :func:`main` has recorded."""
    records = sorted((work / "pruning" / "peers").glob(f"*/{RECORD}"))
    peers = [(file.parent / "model", json.loads(file.read_text(encoding="utf-8"))) for file in records]
    return [Peer(**known, folder=model if (model / "config.json").is_file() else None) for model, known in peers]


def attempts() -> dict[str, Callable[[Path, Path, int], Any]]:
    """Name -> function of (teacher, corpus, percentage) that returns a pruned transformers model."""
    ways: dict[str, Callable[[Path, Path, int], Any]] = {}
    for importance in ("magnitude", "taylor"):
        for shape in ("mlp", "width", "heads"):
            ways[f"Torch-Pruning {shape} {importance}"] = _torch_pruning(shape, importance)
    return ways | {"Model-Optimizer mcore_minitron": _model_optimizer}


def _torch_pruning(shape: str, importance: str) -> Callable[[Path, Path, int], Any]:
    def cut(teacher: Path, corpus: Path, share: int) -> Any:
        import torch_pruning as tp
        from transformers import AutoModelForCausalLM

        model = model_from(str(teacher), AutoModelForCausalLM, dtype="float32")
        model.config.use_cache = False  # otherwise tracing does not end
        keep, config = SHAPES[share][shape], model.config
        mlp = 1 - keep["intermediate_size"] / config.intermediate_size
        hidden = 1 - keep.get("hidden_size", config.hidden_size) / config.hidden_size
        heads = 1 - keep.get("num_attention_heads", config.num_attention_heads) / config.num_attention_heads
        layers = list(model.model.layers)
        ratios = {layer.mlp.gate_proj: mlp for layer in layers} | {layer.mlp.up_proj: mlp for layer in layers}
        if hidden:
            ratios |= {layer.mlp.down_proj: hidden for layer in layers}
            ratios |= {layer.self_attn.o_proj: hidden for layer in layers}
        attention = [p for x in layers for p in (x.self_attn.q_proj, x.self_attn.k_proj, x.self_attn.v_proj)]
        # with num_heads set, it fails even if no head is removed; so the attention is excluded instead
        num_heads = {p: p.out_features // config.head_dim for p in attention} if heads else {}
        fenced = [model.lm_head, *([] if heads else attention)]
        batch = calibration(teacher, corpus)
        kinds = {"magnitude": tp.importance.GroupMagnitudeImportance, "taylor": tp.importance.GroupTaylorImportance}
        pruner = tp.pruner.BasePruner(
            model,
            example_inputs=batch[:1],
            importance=kinds[importance](),
            pruning_ratio=0.0,
            pruning_ratio_dict=ratios,
            ignored_layers=fenced,
            num_heads=num_heads,
            prune_num_heads=heads > 0,
            prune_head_dims=False,
            head_pruning_ratio=heads,
            output_transform=lambda out: out.logits,
        )
        if importance == "taylor":
            for part in batch.split(8):
                model(input_ids=part, labels=part).loss.backward()
        pruner.step()
        return plain(model, keep)

    return cut


def _model_optimizer(teacher: Path, corpus: Path, share: int) -> Any:
    import modelopt.torch.prune as mtp
    from transformers import AutoModelForCausalLM

    model = model_from(str(teacher), AutoModelForCausalLM, dtype="float32")
    batch = calibration(teacher, corpus)

    def forward(pruned: Any) -> None:
        for part in batch.split(8):
            pruned(input_ids=part)

    keep = SHAPES[share]["width"]
    sizes = {"hidden_size": keep["hidden_size"], "ffn_hidden_size": keep["intermediate_size"]}
    pruned, _ = mtp.prune(
        model, mode="mcore_minitron", constraints={"export_config": sizes}, dummy_input=batch[:1],
        config={"forward_loop": forward},
    )  # fmt: skip
    return plain(pruned, keep)


def plain(model: Any, keep: dict[str, int]) -> Any:
    """Copy the pruned weights, strictly, to a new model with a config of their sizes."""
    from transformers import AutoModelForCausalLM

    sizes = {
        **keep,
        "intermediate_size": model.model.layers[0].mlp.up_proj.out_features,
    }  # the peer rounds 104 down to 103
    config = type(model.config)(**{**model.config.to_dict(), **sizes, "use_cache": True})
    fresh = model_of(config, AutoModelForCausalLM)
    fresh.load_state_dict(model.state_dict(), strict=True)
    return fresh


def calibration(teacher: Path, corpus: Path) -> Any:
    """Sequences of the training text, evenly distributed over its documents; int64 [sequences, length]."""
    import torch

    tokenizer = tokenizer_from(str(teacher))
    with gzip.open(corpus / "train.jsonl.gz", "rt", encoding="utf-8") as file:
        ids = [i for line in file for i in tokenizer(json.loads(line)["text"])["input_ids"]]
    blocks = torch.tensor(ids[: len(ids) // SEQUENCE_LENGTH * SEQUENCE_LENGTH]).view(-1, SEQUENCE_LENGTH)
    return blocks[:: len(blocks) // SEQUENCES][:SEQUENCES]


def attempt(name: str, share: int, corpus: Path, work: Path) -> Peer:
    """Run one attempt in its own process; the outcome is its last line of output, or that the time is up."""
    folder = work / "pruning" / "peers" / f"{share}-{name.replace(' ', '-')}"
    if (folder / RECORD).is_file():
        return next(peer for peer in found(work) if (peer.name, peer.share) == (name, share))
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", __spec__.name if __spec__ else "benchmarks.pruning_peers"]
    command += ["--corpus", str(corpus), "--work", str(work), "--one", name, str(share), str(folder / "model")]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT_S, check=False)
        printed = [line for line in (done.stdout if done.returncode == 0 else done.stderr).splitlines() if line.strip()]
        outcome = printed[-1] if printed else f"exit code {done.returncode} and nothing printed"
    except subprocess.TimeoutExpired:
        outcome = f"no result in {TIME_LIMIT_S} s"
    peer = Peer(name, share, outcome.replace(str(work), "WORK"))
    known = {key: value for key, value in asdict(peer).items() if key != "folder"}
    (folder / RECORD).write_text(json.dumps(known, indent=2), encoding="utf-8")
    return peer


def main() -> None:
    """Make all attempts that were not made before."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--one", nargs=3, metavar=("NAME", "SHARE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        name, share, folder = options.one
        model = attempts()[name](options.work / "books-teacher-final", options.corpus, int(share))
        model.save_pretrained(folder)
        for file in (options.work / "books-teacher-final").glob("*token*.json"):
            shutil.copy(file, folder)
        print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
        return
    for name in attempts():
        for share, shapes in SHAPES.items():
            if not name.startswith("Torch-Pruning") or name.split()[1] in shapes:
                peer = attempt(name, share, options.corpus, options.work)
                print(f"{peer.name} {peer.share} %: {peer.outcome}", flush=True)


if __name__ == "__main__":
    main()
