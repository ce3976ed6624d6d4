"""The subcommands of ``torchdrop``: they parse the arguments, run, and print the results."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from typer.main import get_command

import torchdrop

from . import options
from .compare_settings import Settings
from .errors import UserError
from .table import WIDTH

__all__ = ["app", "command"]

app = typer.Typer(
    name="torchdrop",
    help="Stochastic depth that really skips the work.",
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)


def command(arguments: list[str]) -> int | None:
    """Parse the arguments and run the subcommand.

    Raises:
        UserError: The arguments are wrong, or the subcommand cannot do what they ask for.
        KeyboardInterrupt: The user stopped it.
    """
    try:
        code: Any = get_command(app)(args=arguments, prog_name="torchdrop", standalone_mode=False)
    except Exception as error:
        # click's usage errors; newer releases of typer have classes of their own for them, so
        # that they are recognised by the method that formats them.
        describe = getattr(error, "format_message", None)
        if describe is None:
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            print(describe())
            return 2
        raise UserError(f"{describe()} See torchdrop --help") from error
    return code if isinstance(code, int) else None


def _print_version(asked: bool) -> None:
    if asked:
        print(f"torchdrop {torchdrop.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Stochastic depth that really skips the work."""


def _console() -> Console:
    """Return a console for standard output: colours in a terminal only, else plain text.

    It is at least as wide as the tables, since a row that wraps can be read and a figure that is
    cut off cannot.
    """
    return Console(width=max(WIDTH, shutil.get_terminal_size().columns))


@app.command()
def compare(
    out: options.CompareOut = Path("runs/compare"),
    methods: options.Methods = None,
    model: options.CompareModel = None,
    data: options.DataName = None,
    preset: options.PresetName = None,
    p: options.CompareP = None,
    seeds: options.Seeds = 3,
    train_size: options.TrainSize = None,
    val_size: options.ValSize = None,
    test_size: options.TestSize = None,
    image_size: options.ImageSize = None,
    epochs: options.Epochs = None,
    batch_size: options.BatchSize = None,
    lr: options.LearningRate = None,
    augment: options.Augment = None,
    cost_steps: options.CostSteps = 7,
    threads: options.CompareThreads = None,
    devices: options.Devices = 1,
    accelerator: options.Accelerator = "auto",
    precision: options.Precision = "32-true",
    data_dir: options.DataDir = Path("data"),
    download: options.Download = False,
    resume: options.Resume = False,
) -> None:
    """Train a network once per method and seed, and show what each method gains and costs."""
    settings = Settings(
        out=out,
        methods=tuple(part.strip() for part in methods.split(",")) if methods else None,
        model=model,
        data=data,
        preset=preset,
        p=tuple(p or ()),
        seeds=seeds,
        train_size=train_size,
        val_size=val_size,
        test_size=test_size,
        image_size=image_size,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=lr,
        augment=augment,
        cost_steps=cost_steps,
        threads=threads,
        devices=devices,
        accelerator=accelerator,
        precision=precision,
        data_dir=data_dir,
        download=download,
        resume=resume,
        progress=sys.stderr.isatty(),
    )
    _compare(settings)


def _compare(settings: Settings) -> None:
    """Run a comparison, print its table and write its report."""
    from .compare import compare as run
    from .table import table

    console = _console()
    reporting = find_spec("jinja2") is not None and find_spec("matplotlib") is not None
    if not reporting:
        console.print("no report.html will be written: pip install 'torchdrop\\[report]'")

    def finish(content: dict[str, Any]) -> None:
        console.print(table(content))
        if reporting:
            from .report import write_report

            write_report(content, settings.out / "report.html")

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False)

    try:
        run(settings, say, finish)
    except KeyboardInterrupt:
        print(f"\n{_how_to_continue(settings.out)}", file=sys.stderr)
        raise
    written = "results.json and report.html are" if reporting else "results.json is"
    say(f"{written} in {settings.out}")


def _how_to_continue(out: Path) -> str:
    """Return the message after Ctrl-C: the command that continues the comparison."""
    from .results import FILE

    words = shlex.join(word for word in sys.argv[1:] if word != "--resume")
    if (out / FILE).exists():
        return f"stopped; finished runs are kept, go on with: torchdrop {words} --resume"
    return f"stopped before anything was finished; begin again with: torchdrop {words}"


@app.command()
def bench(
    model: options.BenchModel,
    p: options.BenchP = 0.2,
    schedule: options.Schedule = "linear",
    mode: options.Mode = "row",
    batch: options.Batch = 32,
    size: options.Size = None,
    channels_last: options.ChannelsLast = False,
    compile: options.Compile = False,
    steps: options.Steps = None,
    device: options.Device = None,
    threads: options.BenchThreads = None,
    out: options.BenchOut = Path("runs/bench"),
) -> None:
    """Time training steps of a model on this machine: dense, masked, and skipping branches."""
    with _stage_progress() as tell:
        # Imported once the progress bar is drawn, since the import takes seconds.
        from .bench import Settings as BenchSettings
        from .bench import bench as run
        from .table import bench_table

        settings = BenchSettings(
            model=model,
            out=out,
            p=p,
            schedule=schedule,
            mode=mode,
            batch=batch,
            size=size,
            channels_last=channels_last,
            compile=compile,
            steps=steps,
            device=device,
            threads=threads,
        )
        content = run(settings, tell)

    console = _console()
    console.print(bench_table(content))
    console.print(content["finding"], markup=False, highlight=False)
    console.print(f"All figures are in {content['path']}", markup=False, highlight=False)


@contextmanager
def _stage_progress() -> Iterator[Callable[[str, int, int], None]]:
    """Show a progress bar on standard error; without a terminal, a line for each stage.

    Yields:
        A function of the stage, the number of rounds done and the number of all rounds.
    """
    shown = sys.stderr.isatty()
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("step {task.completed} of {task.total}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not shown,
    ) as progress:
        bar = progress.add_task("loading", total=None)

        def tell(stage: str, done: int, total: int) -> None:
            if not shown and stage != progress.tasks[0].description:
                print(stage, file=sys.stderr, flush=True)
            progress.update(bar, completed=done, total=total, description=stage)

        yield tell
