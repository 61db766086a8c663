"""The command line: verbs, exit codes and printing. Nothing here imports torch before a verb needs it."""

from __future__ import annotations

import errno
import gc
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from distill import __version__, cli_stages
from distill.core import output, stop, threads
from distill.core.errors import DistillError, InputError, Interrupted, RankEnded, Stopped
from distill.core.outside import check_appendable, read
from distill.core.quiet import quiet_torchao
from distill.core.sweep import trial_of_sweep
from distill.core.unattended import unattended

app = typer.Typer(
    help="From a big language model to a small one that is ready to ship, by one recipe.",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

RecipeFile = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of one that comes with distill.")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a value, such as stages.distill.optimizer.lr=5e-5."),
]


@app.command()
def run(
    recipe: RecipeFile,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Like --set; for the agents of sweeps.")
    ] = None,
    set: Set = None,
    run_dir: Annotated[Path | None, typer.Option(help="Folder of the run; unset: runs/<name of the recipe>.")] = None,
    only: Annotated[
        str | None, typer.Option(metavar="STAGE", help="Run only this stage, again if it is finished.")
    ] = None,
    from_: Annotated[
        str | None, typer.Option("--from", metavar="STAGE", help="Run this stage and all later stages again.")
    ] = None,
) -> None:
    """Run a recipe. Running the same command again resumes it."""
    with unattended():
        from distill.forecast import describe
        from distill.recipe import Recipe
        from distill.recipes import find

        loaded = Recipe.load(find(recipe), [*(overrides or []), *(set or [])])
        if run_dir is None and (trial := trial_of_sweep()) is not None:
            run_dir = Path("runs") / f"{loaded.name}-{trial}"
        describe(loaded)  # finds what would else be found hours into the run
        from distill.runner import run as run_recipe

        gc.freeze()  # each stage collects garbage; the modules imported so far need not be searched for it
        run_recipe(loaded, run_dir, only=only, start=from_, command=shlex.join(["distill", *sys.argv[1:]]))


@app.command()
def resume(
    run_dir: Annotated[Path, typer.Argument(help="Folder of a run.")],
    set: Annotated[
        list[str] | None, typer.Option("--set", metavar="compute.KEY=VALUE", help="Only compute may change.")
    ] = None,
) -> None:
    """Resume a run; only its compute settings may change."""
    with unattended():
        from distill.api.open_run import load_run
        from distill.core.run_folder import RECIPE
        from distill.recipe import Recipe

        load_run(run_dir)
        for override in set or []:
            if not override.startswith("compute."):
                raise InputError(
                    f"--set {override}: only compute may change on resume; start a new run for anything else"
                )
        loaded = Recipe.load(run_dir / RECIPE, set or [])
        from distill.runner import run as run_recipe

        gc.freeze()  # each stage collects garbage; the modules imported so far need not be searched for it
        run_recipe(loaded, run_dir)


@app.command(short_help="Validate a recipe and print its plan, without a GPU.")
def check(
    recipe: RecipeFile,
    set: Set = None,
    memory: Annotated[
        float | None, typer.Option(metavar="GB", min=0.001, help="Memory of one GPU; unset: that of this machine.")
    ] = None,
    trace: Annotated[
        bool, typer.Option("--trace", help="Trace a step of each training stage on fake GPUs; takes minutes.")
    ] = False,
    gpu: Annotated[
        str | None, typer.Option(help="With --trace: H100, H200, B200, L4 or RTX 4090; unset: all of them.")
    ] = None,
    devices: Annotated[
        int | None, typer.Option(min=1, help="With --trace: number of GPUs per machine; unset: compute.devices.")
    ] = None,
    nodes: Annotated[
        int | None, typer.Option(min=1, help="With --trace: number of machines; unset: compute.num_nodes.")
    ] = None,
) -> None:
    """Validate a recipe and print its plan; needs no GPU, no download and, without --trace, no torch."""
    from distill.forecast import describe
    from distill.recipe import Recipe
    from distill.recipes import find

    if not trace and (unused := [f"--{k}" for k, v in [("gpu", gpu), ("devices", devices), ("nodes", nodes)] if v]):
        raise InputError(f"{', '.join(unused)}: only with --trace; add it")
    loaded = Recipe.load(find(recipe), set or [])
    if trace:
        from distill.trace.report import describe_traces

        traces = describe_traces(loaded, gpu, devices, nodes)
    print(describe(loaded, memory), flush=True)
    for line in traces if trace else ():
        print(line, flush=True)


@app.command(short_help="Write a recipe to start from.")
def init(
    name: Annotated[
        str,
        typer.Argument(
            metavar="[NAME]", help="Name of a recipe that comes with distill; unset: a recipe to start from."
        ),
    ] = "start",
    out: Annotated[Path | None, typer.Option(help="File to write; unset: NAME.yaml, or recipe.yaml.")] = None,
) -> None:
    """Write a recipe to start from, or a copy of one that comes with distill."""
    from distill.recipes import START, copy_of

    file = out or Path("recipe.yaml" if name == START else f"{Path(name).name.removesuffix('.yaml')}.yaml")
    copy_of(name, file)
    print(f"{file}: written. Edit it, then: distill check {file}, distill run {file}")


@app.command(short_help="Print training rows.")
def data(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE",
            help="A recipe file, the name of one that comes with distill, or RUN_DIR/STAGE of a "
            "synthesize stage, whose rows are shown, kept and dropped.",
        ),
    ],
    set: Set = None,
    rows: Annotated[int, typer.Option(min=0, help="Number of rows to print, from the start of the training.")] = 3,
    start: Annotated[int, typer.Option(min=0, help="Number of rows to skip; only for RUN_DIR/STAGE.")] = 0,
    run_dir: Annotated[
        Path | None, typer.Option(help="Folder of the run, where tokens are kept; unset: runs/<name of the recipe>.")
    ] = None,
    stage: Annotated[str | None, typer.Option(help="Show the text of this stage; unset: the recipe's.")] = None,
) -> None:
    """Print the training rows of a recipe, and which of their tokens are trained on."""
    from distill.show_data import show_named

    show_named(recipe, set or [], run_dir, rows, start, stage)


@app.command("list", short_help="List losses, stages, quantizers ... with their keys.")
def list_members(
    family: Annotated[
        str | None,
        typer.Argument(
            help="recipes, stages, losses, criteria, quantizers, activations, sources, codecs, exporters, tasks, "
            "makers, model_tasks, or a section such as data, compute, keep, search, optimizer, lora, mixed; unset: all."
        ),
    ] = None,
) -> None:
    """List every member of a family or section with its fields, or the recipes that come with distill."""
    from distill.listing import listing

    print(listing(family))


@app.command(short_help="Write one report over several runs.")
def report(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="Folders of runs.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the report; unset: comparison/ in the first run.")] = None,
) -> None:
    """Compare runs: print their table and write one page over all of them."""
    from distill.compare import report_runs

    table, page = report_runs(run_dirs, out or run_dirs[0] / "comparison")
    print(table)
    print(f"report: {page}")


@app.command(short_help="Let the models of a run answer the same prompts.")
def compare(
    run_dir: Annotated[Path, typer.Argument(help="Folder of a run.")],
    prompt: Annotated[list[str] | None, typer.Option(help="A text to continue; may be given more than once.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="File with one text per line.")] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Largest number of tokens of an answer.")] = 48,
) -> None:
    """Let every model of a run continue the same texts; chat models answer them as user messages."""
    from distill.compare import answer_prompts

    try:
        lines = read(prompts).decode("utf-8").replace("\r\n", "\n").split("\n") if prompts else []
    except UnicodeDecodeError as error:
        raise InputError(f"--prompts {prompts}: cannot be read as text ({error})") from None
    texts = [*(prompt or []), *(line for line in lines if line.strip())]
    if not texts:
        raise InputError("nothing to continue; give --prompt TEXT or --prompts FILE")
    for item in answer_prompts(run_dir, texts, new_tokens=new_tokens):
        print(f"\n> {item['prompt']}")
        for name, answer in item["answers"].items():
            print(f"  {name:<24} {answer['text']!r}")


@app.command(short_help="Show a run while it works.")
def watch(
    run_dir: Annotated[Path, typer.Argument(help="Folder of a run, on this machine or mounted.")],
    once: Annotated[bool, typer.Option("--once", help="Print it once and end.")] = False,
) -> None:
    """Show a run while it works: stages, losses, remaining time, processors and GPUs; Ctrl-C ends only this view."""
    from distill.watch import watch as show

    show(run_dir, once=once)


@app.command(short_help="Write the JSON schema of recipes for editors.")
def schema(
    file: Annotated[Path | None, typer.Argument(help="File to write; unset: print it.")] = None,
) -> None:
    """Write the JSON schema of a recipe, for completion and checks in editors."""
    from distill.listing import schema_text

    if file is None:
        print(schema_text(), end="")
    else:
        from distill.core.artifact import write_text

        check_appendable(file)  # a device would be replaced by a file
        write_text(file, schema_text())


for verb in cli_stages.VERBS:
    first, _, _ = str(verb.__doc__).partition(", as")  # click cuts a whole docstring in the middle of a sentence
    app.command(short_help=f"{first}.")(verb)

cache = typer.Typer(help="Inspect a teacher cache on disk.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(cache, name="cache")
CacheFolder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of a cache, which its stage prints.")]


@cache.command("info")
def cache_info(folder: CacheFolder) -> None:
    """Print a teacher cache's teacher, codec, size and fidelity."""
    from distill.data.teacher_cache.verify import caches, describe

    for place in caches(folder):
        print(describe(place))


@cache.command("verify")
def cache_verify(folder: CacheFolder) -> None:
    """Compare every byte of a teacher cache with its checksums; exit code 1 if some have changed."""
    from distill.data.teacher_cache.verify import verify

    print(verify(folder))


@app.command(short_help="Show versions, devices and settings of this machine.")
def doctor() -> None:
    """Print versions, devices, CPU threads and whether the Hugging Face Hub can be reached, for a bug report."""
    from distill.doctor import examine

    print(examine())


def _version(wanted: bool) -> None:
    if wanted:
        print(f"distill {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> NoReturn:
    """Entry point."""
    exit_with(lambda: app(standalone_mode=False))


def exit_with(work: Callable[[], Any]) -> NoReturn:
    """Work, then exit: an error of the user's or the machine's is one clear line and a code, never a traceback."""
    quiet_torchao()
    threads.choose()
    with output.guarded():
        code, line = _outcome(work)
        if line:
            print(line, file=sys.stderr)
        stop.leave(code)


def _outcome(work: Callable[[], Any]) -> tuple[int, str | None]:
    """The exit code of some work, and the line that says why it is not 0."""
    try:
        with stop.listening():
            stop.check()
            if work() == 130:  # typer swallows Ctrl-C and returns this
                raise KeyboardInterrupt
    except typer.Exit as exit_:
        return exit_.exit_code, None
    except SystemExit as exit_:
        return int(exit_.code or 0), None
    except (DistillError, Stopped) as error:
        return error.exit_code, None if isinstance(error, RankEnded) and error.is_told else str(error)
    except (KeyboardInterrupt, typer.Abort):
        return Interrupted.exit_code, "stopped; the same command goes on where this one was left"
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = error.filename or "while writing"
        return 1, f"the disk is full ({where}); make room, then the same command goes on"
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        said = str(error.format_message())  # a mistake in the arguments, found by typer, which carries its own click
        if "\n" in said:  # it is the help, which answers a command without arguments
            return 2, said
        command = getattr(getattr(error, "ctx", None), "command_path", "distill")
        return 2, f"{command}: {said} (see {command} --help)"
    return 0, None
