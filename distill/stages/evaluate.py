"""Size, speed, memory and quality of every model of a run, measured from the artifacts on disk."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from distill.core.artifact import Artifact, write_text
from distill.core.spec import Spec
from distill.stages.base import StageContext, StageSpec
from distill.stages.pace import Pace
from distill.tracking.tradeoff import Role, Row, from_json, to_json

if TYPE_CHECKING:
    from distill.evaluation.speed import Speed

ROWS = "rows.json"


class SpeedSpec(Spec):
    """How speed is measured; the same for every model."""

    prompt_tokens: int = Field(128, ge=1)
    """Tokens of the prompt (prefill)."""
    new_tokens: int = Field(64, ge=1)
    """Tokens made one by one (decode)."""
    repeats: int = Field(5, ge=1)
    """Measurements in a round, after a warm-up."""
    rounds: int = Field(3, ge=1)
    """Times that all models are measured in turn, each in a new process; the least disturbed round of each counts."""
    batch_size: int = Field(1, ge=1)
    """Sequences answered at once."""


class Evaluate(StageSpec):
    """Measure models: quality on the validation text, size on disk, speed and memory each in its own process."""

    kind: Literal["evaluate"] = "evaluate"
    models: tuple[str, ...] = ()
    """Models to measure, by reference; empty: the teacher and every model of the stages before."""
    controls: tuple[str, ...] = ()
    """Those of them that were trained only to be compared with."""
    teacher: str = "teacher"
    """The model that the others are held against; not read in a recipe without a teacher."""
    batch_size: int = Field(8, ge=1)
    """Validation sequences a forward pass."""
    speed: SpeedSpec | None = SpeedSpec()
    """null: measure no speed."""

    def references(self) -> list[tuple[tuple[str | int, ...], str]]:
        """The models that are named."""
        named = [(("models", i), reference) for i, reference in enumerate(self.models)]
        named += [(("controls", i), reference) for i, reference in enumerate(self.controls)]
        return [*named, *([(("teacher",), self.teacher)] if self.teacher != "teacher" else [])]

    def reads(self, earlier: list[str]) -> list[str]:
        """Those that are named, or all."""
        return list(dict.fromkeys([self.teacher, *(self.models or earlier), *self.controls]))

    def run(self, context: StageContext) -> dict[str, Any]:
        """Quality and size of one model after the other, then speed in rounds over all of them."""
        references = self._measured(context)
        teacher = None
        if self.teacher != "teacher" or context.session.teacher is not None:
            teacher = self._load(context, context.session.artifact(self.teacher).location)
        pace = Pace(context, len(references), ("quality", "models"))
        rows = [pace.of(self._row(context, reference, teacher)) for reference in references]
        del teacher  # a GPU's memory is wanted by the processes that measure speed
        if self.speed is not None:
            speeds = self._speeds(context, self.speed, rows)
            rows = [replace(row, **speeds[row.name]) for row in rows]
        for row in rows:
            context.say(_line(row))
        write_text(context.folder / ROWS, to_json(rows))
        return {"models": [row.name for row in rows]}

    def _measured(self, context: StageContext) -> list[str]:
        if self.models:
            return list(dict.fromkeys([*self.models, *self.controls]))
        stages = context.session.stages
        before = list(stages)[: list(stages).index(context.name)]
        teacher = [self.teacher] if self.teacher != "teacher" or context.session.teacher else []
        return list(dict.fromkeys([*teacher, *(name for name in before if stages[name].makes_model)]))

    def speaker(self) -> str | None:
        """Each model is measured in its own tokens."""
        return None

    def _load(self, context: StageContext, location: str) -> Any:
        from distill.models.load import move
        from distill.stages.tokens import load_speaking
        from distill.stages.train import check_packing

        device = _device(context)
        return move(check_packing(context, load_speaking(context, location, _dtype(device))), device)

    def _row(self, context: StageContext, reference: str, teacher: Any) -> Row:
        """Everything but speed."""
        from distill.evaluation.quality import measure_quality
        from distill.models.load import load_config, low_bit_scheme
        from distill.models.size import measure_size
        from distill.pruning.mask import nonzero_share

        artifact = context.session.artifact(reference)
        speaking = replace(context, session=context.session.speaking(reference))
        corpus = speaking.session.corpus()
        model = teacher if reference == self.teacher else self._load(speaking, artifact.location)
        if speaking.session.is_cut and teacher is not None:  # held against the teacher's words in its own tokens
            teacher = self._load(speaking, context.session.artifact(self.teacher).location)
        quality = measure_quality(model, teacher, corpus.validation_loader(self.batch_size), corpus.validation_bytes)
        size = measure_size(local_folder(artifact))
        lineage = artifact.lineage()
        masked = lineage is not None and lineage.mask is not None
        return Row(
            name=reference,
            role=self._role(reference),
            kernel="simulated" if low_bit_scheme(load_config(artifact.location)) else "real",
            parameters=size.parameters,
            non_embedding_parameters=size.non_embedding_parameters,
            weight_bytes=size.weight_bytes,
            nonzero_share=nonzero_share(model) if masked else None,
            bits_per_parameter=size.bits_per_parameter,
            perplexity=quality.perplexity,
            loss_nats=quality.loss_nats,
            bits_per_byte=quality.bits_per_byte,
            kl_to_teacher=quality.kl_to_teacher,
            top1_agreement=quality.top1_agreement,
            **_history(context, reference, artifact),
        )

    def _speeds(self, context: StageContext, spec: SpeedSpec, rows: list[Row]) -> dict[str, dict[str, Any]]:
        """Row name -> its speed columns. All models in turn, in rounds: what disturbs the machine for some seconds does
        not stay with one model."""
        from distill.evaluation.speed import measure_speed, quietest

        device = _device(context)
        measured: dict[str, list[Speed]] = {row.name: [] for row in rows}
        pace = Pace(context, spec.rounds * len(rows), ("speed", "measurements"))
        for _ in range(spec.rounds):
            for row in rows:
                speed = measure_speed(
                    context.session.artifact(row.name).location,
                    kernel=row.kernel,
                    prompt_tokens=spec.prompt_tokens,
                    new_tokens=spec.new_tokens,
                    repeats=spec.repeats,
                    batch=spec.batch_size,
                    device=device,
                    dtype=_dtype(device),
                )
                measured[row.name].append(pace.of(speed))
        return {name: _columns(quietest(speeds)) for name, speeds in measured.items()}

    def _role(self, reference: str) -> Role:
        if reference == self.teacher:
            return "teacher"
        return "control" if reference in self.controls else "student"


def _device(context: StageContext) -> str:
    from distill.training.trainer import resolve_device

    return resolve_device(context.session.compute)


def _dtype(device: str) -> str:
    """As stored on a GPU; a CPU is slow in bf16."""
    return "auto" if device == "cuda" else "float32"


def _columns(speed: Speed) -> dict[str, Any]:
    return {
        "prefill_ms": speed.prefill_ms_p50,
        "decode_tokens_per_s": speed.decode_tokens_per_s_p50,
        "decode_tokens_per_s_p90": speed.decode_tokens_per_s_p90,
        "peak_memory_bytes": speed.peak_memory_bytes,
        "memory_above_start_bytes": speed.memory_above_start_bytes,
        "engine": speed.engine,
        "device": speed.device,
        "dtype": speed.dtype,
    }


def _history(context: StageContext, reference: str, artifact: Artifact) -> dict[str, Any]:
    """What the lineage says: how the model came about."""
    lineage = artifact.lineage() if reference in context.session.stages else None
    if lineage is None:
        return {}
    figures = lineage.figures
    notes = [f"mask {lineage.mask}, stored and run as dense"] * (lineage.mask is not None)
    if lineage.num_tokens is not None:
        notes.append(f"vocabulary cut to {lineage.num_tokens:,} tokens, KL over these; compare bits per byte")
    return {
        "kind": lineage.kind,
        "parent": lineage.parent if getattr(context.session.stages[reference], "weights", "") != "random" else None,
        "scheme": figures.get("scheme"),
        "notes": "; ".join(notes),
        "training_tokens": figures.get("training_tokens", 0),
        "training_seconds": figures.get("training_seconds", 0.0),
    }


def local_folder(artifact: Artifact) -> str:
    """The folder of a model, fetched from the Hub's cache when it lives there."""
    if artifact.folder is not None:
        return str(artifact.folder)
    from huggingface_hub import snapshot_download

    return snapshot_download(artifact.location, allow_patterns=["*.safetensors", "*.json"])


def _line(row: Row) -> str:
    parts = [f"{row.name:<24} perplexity {row.perplexity:8.2f}"]
    if row.kl_to_teacher is not None:
        parts.append(f"KL {row.kl_to_teacher:.4f}")
    if row.weight_bytes is not None:
        parts.append(f"{row.weight_bytes / 1e6:.2f} MB")
    if row.decode_tokens_per_s is not None:
        parts.append(f"decode {row.decode_tokens_per_s:.0f} tokens/s")
    return "  ".join(parts)


def measured_rows(context: StageContext) -> list[Row]:
    """The rows of the evaluate stages before this one; a model that was measured twice counts once, the last time."""
    found: dict[str, Row] = {}
    for name, stage in context.session.stages.items():
        if name == context.name:
            break
        file = context.session.run.stage(name) / ROWS
        if stage.kind == "evaluate" and file.is_file():
            found |= {row.name: row for row in from_json(file.read_text())}
    return list(found.values())
