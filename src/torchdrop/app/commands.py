"""The arguments of each subcommand, and what is printed."""

from __future__ import annotations

import shlex
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from typer.main import get_command

import torchdrop

from .errors import UserError

__all__ = ["app", "command"]

app = typer.Typer(
    name="torchdrop",
    help="Stochastic depth that really skips the work.",
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)


def command(arguments: list[str]) -> int | None:
    """Parse the arguments and run what they ask for.

    Raises:
        UserError: The arguments are wrong, or what they ask for cannot be done.
        KeyboardInterrupt: The user stopped it.
    """
    try:
        code: Any = get_command(app)(args=arguments, prog_name="torchdrop", standalone_mode=False)
    except Exception as error:
        # Usage errors of click, which typer has begun to carry under a name of its own.
        describe = getattr(error, "format_message", None)
        if describe is None:
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            print(describe())
            return 2
        raise UserError(f"{describe()} See torchdrop --help") from error
    return code if isinstance(code, int) else None


def _version(asked: bool) -> None:
    if asked:
        print(f"torchdrop {torchdrop.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Stochastic depth that really skips the work."""


@app.command()
def compare(
    out: Annotated[Path, typer.Option(help="Where results.json and report.html go.")] = Path(
        "runs/compare"
    ),
    methods: Annotated[
        str | None,
        typer.Option(
            help="Comma separated, or all that have a place in the network: none, dropout, "
            "drop_path, stochastic_depth_row, stochastic_depth_batch, subsample; also "
            "dropout_before_bn, dropout_after_bn, drop_block, spatial_dropout, gaussian_dropout, "
            "uniform_dropout, shake_drop, cutout, path_drop. None is always run.",
            show_default="the first six; on fractalnet none, dropout, path_drop",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="resnet-N (6n+2 layers), fractalnet, torchvision:NAME or package.module:factory.",
            show_default="resnet-20",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="digits, mnist5k, folder:PATH or torchvision:NAME.", show_default="digits"
        ),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="A whole recipe: paper-cifar10. Other options override it.")
    ] = None,
    p: Annotated[
        list[str] | None,
        typer.Option(
            help="Drop probability of all methods, or METHOD=P of one; of uniform_dropout beta, "
            "which is no probability and is given by name. Repeatable."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Runs of each method.")] = 3,
    train_size: Annotated[
        int | None,
        typer.Option(help="Training images.", show_default="200 of digits, else all there are"),
    ] = None,
    val_size: Annotated[
        int | None,
        typer.Option(
            help="Validation images; the epoch of their lowest error is reported.", show_default="0"
        ),
    ] = None,
    test_size: Annotated[
        int | None,
        typer.Option(
            help="Test images.",
            show_default="1000 of digits and mnist5k, a fifth of a folder, else the test split",
        ),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(
            help="Resize all images to this side.", show_default="as they are; 32 of a folder"
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(help="Passes over the training images.", show_default="60, or the preset's"),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Images a step, over all devices.", show_default="50, or the preset's"),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            help="The highest learning rate; it falls to a tenth after half of the epochs and to a "
            "hundredth after three quarters.",
            show_default="0.05, or the preset's",
        ),
    ] = None,
    augment: Annotated[
        str | None,
        typer.Option(help="none, shift or flip-shift.", show_default="none, or the preset's"),
    ] = None,
    cost_steps: Annotated[
        int, typer.Option(help="Steps of each seed that FLOPs and bytes are the mean of.")
    ] = 7,
    threads: Annotated[
        int | None,
        typer.Option(
            help="CPU threads. 1 is safest for small networks on a busy machine.",
            show_default="1 for the default network on digits, else all cores",
        ),
    ] = None,
    devices: Annotated[int, typer.Option(help="Devices to train on, by DDP.")] = 1,
    accelerator: Annotated[str, typer.Option(help="Lightning's: auto, cpu, gpu, mps.")] = "auto",
    precision: Annotated[
        str, typer.Option(help="Lightning's: 32-true, bf16-mixed, 16-mixed.")
    ] = "32-true",
    data_dir: Annotated[Path, typer.Option(help="Where torchvision's data sets are.")] = Path(
        "data"
    ),
    download: Annotated[
        bool, typer.Option("--download", help="Let torchvision download its data set.")
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with the runs missing in --out; there may be more seeds and methods now.",
        ),
    ] = False,
) -> None:
    """Train a network once per method and seed; show what each method buys and costs."""
    from .compare import Settings
    from .compare import compare as run
    from .results import FILE
    from .table import WIDTH, table

    # Never narrower than the table: a figure that is cut off is worse than a line that wraps.
    console = Console(width=max(WIDTH, shutil.get_terminal_size().columns))
    reporting = find_spec("jinja2") is not None and find_spec("matplotlib") is not None
    if not reporting:
        console.print("there will be no report.html: pip install 'torchdrop\\[report]'")
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

    def finish(content: dict[str, Any]) -> None:
        console.print(table(content))
        if reporting:
            from .report import write_report

            write_report(content, out / "report.html")

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False)

    try:
        run(settings, say, finish)
    except KeyboardInterrupt:
        again = [word for word in sys.argv[1:] if word != "--resume"]
        begun = (out / FILE).exists()
        print(
            f"\nstopped; {'what is finished is kept, go on' if begun else 'begin again'} with: "
            f"torchdrop {shlex.join(again)}{' --resume' * begun}",
            file=sys.stderr,
        )
        raise
    written = "results.json and report.html" if reporting else "results.json"
    console.print(f"{written} are in {out}", markup=False, highlight=False)


@app.command()
def bench(
    model: Annotated[
        str,
        typer.Argument(
            help="A name of torchvision or timm, resnet-N, or package.module:factory.",
            show_default=False,
        ),
    ],
    p: Annotated[float, typer.Option(help="Drop probability of the deepest block.")] = 0.2,
    schedule: Annotated[
        str, typer.Option(help="Over depth: linear, linear_from_zero or uniform.")
    ] = "linear",
    mode: Annotated[str, typer.Option(help="row or batch.")] = "row",
    batch: Annotated[int, typer.Option(help="Images a step.")] = 32,
    size: Annotated[
        int | None, typer.Option(help="Side of an image.", show_default="the model's own")
    ] = None,
    channels_last: Annotated[
        bool, typer.Option("--channels-last", help="Model and images in this memory format.")
    ] = False,
    compile: Annotated[bool, typer.Option("--compile", help="Run all by torch.compile.")] = False,
    steps: Annotated[
        int | None,
        typer.Option(help="Timed steps of each.", show_default="21, in batch mode 60"),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or mps.", show_default="the fastest there is")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads.", show_default="torch's choice")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where the JSON file goes.")] = Path("runs/bench"),
) -> None:
    """Time training steps of a model here: dense, masked, and skipping what is dropped."""
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

        def tell(doing: str, done: int, total: int) -> None:
            if not shown and doing != progress.tasks[0].description:
                print(doing, file=sys.stderr, flush=True)
            progress.update(bar, completed=done, total=total, description=doing)

        from .bench import Settings
        from .bench import bench as run
        from .table import WIDTH, bench_table

        content = run(
            Settings(
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
            ),
            tell,
        )
    console = Console(width=max(WIDTH, shutil.get_terminal_size().columns))
    console.print(bench_table(content))
    console.print(content["finding"], markup=False, highlight=False)
    console.print(f"All figures are in {content['path']}", markup=False, highlight=False)
