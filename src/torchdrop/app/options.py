"""The options of the subcommands, with their help texts.

Names and defaults in the texts are read from where they are defined, so that another method, depth
rule or preset appears in the help without an edit here.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from torchdrop.checks import MODES
from torchdrop.schedules import DEPTH_RULES

from .compare_settings import ALL, DEFAULT_DATA, DEFAULT_METHODS, DEFAULT_MODEL, DEFAULT_TRAIN_SIZES
from .data import DATA_NAMES, DEFAULT_TEST_SIZE, FOLDER_IMAGE_SIZE
from .methods import METHODS, NONE
from .models import FRACTALNET_METHODS, MODEL_NAMES
from .recipe import AUGMENTATIONS, PRESETS, default_recipe


def _one_of(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last


_RECIPE = default_recipe()
_NOT_DEFAULT = [name for name in METHODS if name not in DEFAULT_METHODS]
_NOT_RATES = [name for name, method in METHODS.items() if not method.rate]

# torchdrop compare

CompareOut = Annotated[Path, typer.Option(help="Directory for results.json and report.html.")]
Methods = Annotated[
    str | None,
    typer.Option(
        help=f"Methods to compare, separated by commas, or '{ALL}' for every method that the "
        f"network has a place for. By default: {', '.join(DEFAULT_METHODS)}. Others: "
        f"{', '.join(_NOT_DEFAULT)}. '{NONE}' is always run.",
        show_default=f"see above; for fractalnet {', '.join(FRACTALNET_METHODS)}",
    ),
]
CompareModel = Annotated[
    str | None,
    typer.Option(
        help=f"Network to train: {_one_of(MODEL_NAMES)}.",
        show_default=DEFAULT_MODEL,
    ),
]
DataName = Annotated[
    str | None,
    typer.Option("--data", help=f"Images: {_one_of(DATA_NAMES)}.", show_default=DEFAULT_DATA),
]
PresetName = Annotated[
    str | None,
    typer.Option(
        "--preset",
        help=f"Network, data, methods and recipe of a published experiment: {_one_of(PRESETS)}. "
        f"Other options override parts of it.",
    ),
]
CompareP = Annotated[
    list[str] | None,
    typer.Option(
        "--p",
        help="Drop probability: a number for all methods, or METHOD=NUMBER for one. May be given "
        f"several times. {_one_of(_NOT_RATES)} takes its p by name only, since it is not a "
        f"probability.",
        show_default="each method's own",
    ),
]
Seeds = Annotated[int, typer.Option(help="Number of runs of each method.")]
TrainSize = Annotated[
    int | None,
    typer.Option(
        help="Number of training images.",
        show_default=", ".join(f"{n} of {name}" for name, n in DEFAULT_TRAIN_SIZES.items())
        + ", else all that are left",
    ),
]
ValSize = Annotated[
    int | None,
    typer.Option(
        help="Number of validation images. If there are any, the epoch with the lowest validation "
        "error is reported, else the last one.",
        show_default="0, or the preset's",
    ),
]
TestSize = Annotated[
    int | None,
    typer.Option(
        help="Number of test images.",
        show_default=f"{DEFAULT_TEST_SIZE} of digits and mnist5k, a fifth of a folder, else the "
        f"test split",
    ),
]
ImageSize = Annotated[
    int | None,
    typer.Option(
        help="Resize all images to this height and width.",
        show_default=f"as they are; {FOLDER_IMAGE_SIZE} of a folder",
    ),
]
Epochs = Annotated[
    int | None,
    typer.Option(
        help="Passes over the training images.", show_default=f"{_RECIPE.epochs}, or the preset's"
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        help="Images in a training step, over all devices.",
        show_default=f"{_RECIPE.batch_size}, or the preset's",
    ),
]
LearningRate = Annotated[
    float | None,
    typer.Option(
        "--lr",
        help="Highest learning rate. By default it is divided by 10 after half of the epochs and "
        "by 100 after three quarters.",
        show_default=f"{_RECIPE.learning_rate(0)}, or the preset's",
    ),
]
Augment = Annotated[
    str | None,
    typer.Option(
        help=f"Augmentation of training images: {_one_of(AUGMENTATIONS)}.",
        show_default=f"{_RECIPE.augment}, or the preset's",
    ),
]
CostSteps = Annotated[
    int, typer.Option(help="Training steps per seed over which FLOPs and bytes are averaged.")
]
CompareThreads = Annotated[
    int | None,
    typer.Option(
        help="CPU threads. For small networks on a busy machine, 1 is fastest.",
        show_default=f"1 for the default network on {DEFAULT_DATA}, else torch's choice",
    ),
]
Devices = Annotated[int, typer.Option(help="Number of devices to train on, with DDP.")]
Accelerator = Annotated[
    str, typer.Option(help="Accelerator, as Lightning names it: auto, cpu, gpu or mps.")
]
Precision = Annotated[
    str, typer.Option(help="Precision, as Lightning names it: 32-true, bf16-mixed or 16-mixed.")
]
DataDir = Annotated[Path, typer.Option(help="Directory of torchvision's data sets.")]
Download = Annotated[
    bool, typer.Option("--download", help="Let torchvision download the data set to --data-dir.")
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Continue the comparison in --out: run what is missing. Methods and seeds may be "
        "added.",
    ),
]

# torchdrop bench

BenchModel = Annotated[
    str,
    typer.Argument(
        help="A model of torchvision or timm by its name, resnet-N or package.module:factory.",
        show_default=False,
    ),
]
BenchP = Annotated[
    float, typer.Option("--p", help="Drop probability of the deepest residual block.")
]
Schedule = Annotated[
    str, typer.Option(help=f"Rule for the rates over depth: {_one_of(DEPTH_RULES)}.")
]
Mode = Annotated[
    str,
    typer.Option(help=f"Whether each sample or the whole batch drops a branch: {_one_of(MODES)}."),
]
Batch = Annotated[int, typer.Option(help="Images in a training step.")]
Size = Annotated[
    int | None,
    typer.Option(help="Height and width of the images.", show_default="the model's own"),
]
ChannelsLast = Annotated[
    bool,
    typer.Option("--channels-last", help="Hold model and images in the channels-last layout."),
]
Compile = Annotated[bool, typer.Option("--compile", help="Compile each model by torch.compile.")]
Steps = Annotated[
    int | None,
    typer.Option(help="Timed steps of each variant.", show_default="21; in batch mode 60"),
]
Device = Annotated[
    str | None,
    typer.Option(
        help="Device: cpu, cuda or mps.", show_default="the accelerator if there is one, else cpu"
    ),
]
BenchThreads = Annotated[
    int | None, typer.Option("--threads", help="CPU threads.", show_default="torch's choice")
]
BenchOut = Annotated[Path, typer.Option(help="Directory for the JSON file.")]
