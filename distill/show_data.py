"""The rows of a recipe as they will be trained, with what is learned from in colour, and figures over all of them."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.text import Text

from distill.core.errors import InputError
from distill.core.outside import is_file
from distill.core.run_folder import Run
from distill.data.loader import order_of
from distill.data.micro_batches import MicroBatches
from distill.data.order import GlobalOrder
from distill.data.packed_rows import PackedRows
from distill.data.text_rows import TextRows
from distill.recipe import Recipe
from distill.recipes import find
from distill.show_rows import is_data_set, is_unfinished, show_rows
from distill.stages.session import Session
from distill.stages.text import data_of

if TYPE_CHECKING:
    from distill.data.corpus import Corpus

LEARNED, READ = "green", "dim"
OPEN, CLOSE = "⟦", "⟧"
"""Around what is learned from, where there is no colour."""


def show_named(name: str, set: list[str], run_dir: Path | None, num_rows: int, start: int, stage: str | None) -> None:
    """Print the rows of a recipe, or those that a stage has made.

    Args:
        name: a recipe's file or name, or the folder of a stage that has made rows.
        set: overrides of the recipe.
        run_dir: as of :func:`show`.
        num_rows: as of :func:`show`.
        start: rows to skip first, of a stage's folder.
        stage: as of :func:`show`.

    Raises:
        InputError: see :func:`show`; or an option is of the other form.
    """
    if is_data_set(Path(name)):
        if unused := [f"--{key}" for key, one in (("set", set), ("run-dir", run_dir), ("stage", stage)) if one]:
            raise InputError(f"{', '.join(unused)}: only with a recipe; remove it")
        show_rows(Path(name), num_rows, start)
        return
    if is_unfinished(Path(name)):
        raise InputError(f"{name}: this stage is not finished, its replies are kept; run the same command again first")
    if len(Path(name).parts) > 1 and not is_file(name) and not name.endswith((".yaml", ".yml")):
        raise InputError(f"{name}: neither a recipe's file nor the folder of a synthesize stage (RUN_DIR/STAGE)")
    if start:
        raise InputError("--start: only with RUN_DIR/STAGE of a synthesize stage; remove it")
    show(Recipe.load(find(name), set), run_dir, num_rows, stage=stage)


def show(
    recipe: Recipe, run_dir: Path | None, num_rows: int, console: Console | None = None, stage: str | None = None
) -> None:
    """Tokenize the text of a recipe, as its run would, and print figures and rows.

    Args:
        recipe: whose text.
        run_dir: the run's folder, where tokens are kept; unset: ``runs/<recipe name>``.
        num_rows: rows to print, the first ones of the training.
        console: where to print; unset: standard output.
        stage: whose text; unset: the recipe's own.

    Raises:
        InputError: the text, the tokenizer or the chat template are wrong, or there is no such stage.
    """
    if stage is not None and stage not in recipe.stages:
        raise InputError(f"--stage {stage}: no such stage (stages: {', '.join(recipe.stages)})")
    console = console or Console(highlight=False)
    say = lambda line: console.print(line, soft_wrap=True, markup=False)  # noqa: E731
    session = Session(
        run=Run(run_dir or Path("runs") / recipe.name),
        recipe=recipe.name,
        text=recipe.dump(),
        teacher=recipe.teacher,
        data=recipe.data,
        compute=recipe.compute,
        logging=recipe.logging,
        seed=recipe.seed,
        stages=dict(recipe.stages),
        command="",
        say=lambda line: say(line.strip()),
    )
    data = recipe.data if stage is None else data_of(recipe.stages, recipe.data, stage)
    session = session.of_text(data)
    corpus = session.corpus()
    if isinstance(corpus.train, PackedRows):
        for line in figures(corpus.train):
            say(line)
    coloured = console.color_system is not None
    if data.holds_conversations:
        say(f"learned from: {f'in {LEARNED}' if coloured else f'between {OPEN} and {CLOSE}'}")
    if data.order is not None:
        say("rows are shown as they stand before data.order, which sorts a share of each training")
    say(f"the tokens stay in {session.run.folder / 'data'}, where a run finds them")
    if isinstance(corpus.train, TextRows):
        _show_texts(corpus.train, corpus.seed, num_rows, session.tokenizer(), console)
        return
    for number, pieces in enumerate(_rows(corpus, num_rows), 1):
        tokens, learned = sum(len(ids) for ids, _ in pieces), sum(int(which.sum()) for _, which in pieces)
        say(f"\nrow {number}: {tokens:,} tokens, {learned:,} learned from")
        for place, (ids, which) in enumerate(pieces, 1):
            say(f"--- part {place} of {len(pieces)}, {len(ids):,} tokens; it sees no other part")
            console.print(_marked(session.tokenizer(), ids, which, coloured=coloured), soft_wrap=True)


def figures(packed: PackedRows) -> list[str]:
    """Lengths of what is in a file, and how much of it is learned from."""
    sizes = np.diff(np.asarray(packed.tokens.bounds()))
    at = {"shortest": 0.0, "median": 0.5, "9 of 10 up to": 0.9, "longest": 1.0}
    lines = ["tokens each: " + ", ".join(f"{name} {int(np.quantile(sizes, share)):,}" for name, share in at.items())]
    filled = packed.lengths().sum() / (len(packed) * packed.sequence_length)
    lines.append(f"rows of {packed.sequence_length:,} ({packed.packing}): {len(packed):,}, {filled:.1%} full")
    if packed.tokens.num_learned is not None:
        share = packed.tokens.num_learned / packed.tokens.num_tokens
        lines.append(f"learned from: {packed.tokens.num_learned:,} tokens, {share:.1%} of all")
    return lines


def _rows(corpus: Corpus, count: int) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """Ids and which of them are learned from, of every piece of the first rows of the training."""
    train = corpus.train
    if not isinstance(train, PackedRows):
        read = train.batch(train.first(count))["input_ids"].numpy() if count else ()
        return [[(ids, np.ones(len(ids), bool))] for ids in read]
    order, ids, learned = order_of(train, corpus.seed, MicroBatches(1)), train.tokens.ids(), train.learned()
    rows = []
    for position in range(min(count, len(train))):
        number, pieces = order.row_at(position), []
        for (start, size), lead in zip(train.pieces(number), train.leads(number), strict=True):
            which = np.ones(size, bool) if learned is None else learned[start : start + size]
            read = np.concatenate([np.asarray(train.tokens.start[:lead], ids.dtype), ids[start : start + size]])
            pieces.append((read, np.pad(which, (lead, 0)) if learned is not None else np.ones(len(read), bool)))
        rows.append(pieces)
    return rows


def _show_texts(train: TextRows, seed: int, count: int, tokenizer: Any, console: Console) -> None:
    """Print the first rows of a task: what the model reads, which tokens are predicted, and the class of the text."""
    coloured, classes = console.color_system is not None, train.file.classes
    order = GlobalOrder(len(train), seed, MicroBatches(1), train.lengths())
    for position in range(min(count, len(train))):
        batch = train[[(position, order.row_at(position))]]
        size = int(batch["attention_mask"].sum())
        ids, targets = batch["input_ids"][0, :size].numpy(), batch["targets"][0].numpy()
        predicted = batch.get("text_mask", batch["mask"])[0, :size].numpy().astype(bool)
        of_tokens = train.masking is not None or train.task.head == "token_classification"
        what = f"{int(predicted.sum()):,} predicted" if of_tokens else "one prediction"
        console.print(f"\nrow {position + 1}: {size:,} tokens, {what}", soft_wrap=True, markup=False)
        learned = predicted if of_tokens else np.ones(size, bool)
        console.print(_marked(tokenizer, ids, learned, coloured=coloured), soft_wrap=True)
        if train.masking is not None:
            answers = tokenizer.convert_ids_to_tokens(targets[:size][predicted].tolist())
        elif train.task.head == "token_classification":
            answers = [classes[target] for target in targets[:size][predicted]]
        elif train.task.head == "embedding":
            continue
        else:
            answers = [classes[int(targets[0])] if classes else f"{float(targets[0]):g}"]
        console.print("predicted: " + ", ".join(answers), soft_wrap=True, markup=False)


def _marked(tokenizer: Any, ids: np.ndarray, learned: np.ndarray, *, coloured: bool) -> Text:
    """The text of a piece."""
    text = Text()
    whole = bool(learned.all())  # a text that is learned from as a whole needs no marks
    for is_learned, run in groupby(zip(ids.tolist(), learned.tolist(), strict=True), key=lambda pair: pair[1]):
        said = tokenizer.decode([token for token, _ in run], skip_special_tokens=False)
        if is_learned and not coloured and not whole:
            said = f"{OPEN}{said}{CLOSE}"
        text.append(said, style=LEARNED if is_learned else READ)
    return text
