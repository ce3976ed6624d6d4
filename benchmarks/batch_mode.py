"""Show why whole-batch dropping may test badly after few steps: scaling, rate, BatchNorm.

Trains the CIFAR ResNet of ``torchdrop compare`` on 200 digits and prints the test error of every
variant twice: as trained, and with the statistics of BatchNorm computed again from the training
images in evaluation mode ("recalibrated"). The loss on the training images in evaluation mode shows
how well the statistics fit.

    python benchmarks/batch_mode.py --depth 56 --epochs 40 --seeds 3
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

import torch
from torch import nn

import torchdrop
from torchdrop.app.data import open_source
from torchdrop.app.methods import Applied
from torchdrop.app.models import CifarResNet
from torchdrop.app.recipe import default_recipe
from torchdrop.app.training import Run, evaluate, train


@torch.no_grad()
def recalibrate(model: nn.Module, data) -> None:
    """Compute the running statistics again, with every block in evaluation mode."""
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the plain mean over batches
            module.train()
    model(data.normalised(data.train.pixels, 1))
    model.eval()


def one(args, seed: int, source, options: dict | None, folder: Path) -> dict:
    torch.manual_seed(seed)
    model = CifarResNet(args.depth, 10, 1)
    if options is not None:
        torchdrop.add_stochastic_depth(model, **options)
    data = source.draw(seed, 200)
    recipe = default_recipe().with_epochs(args.epochs).with_learning_rate(args.lr)
    recipe = replace(recipe, batch_size=args.batch_size)
    history = train(
        Run("", model, 1, Applied(), data, recipe, seed, folder, accelerator="cpu", show=False)
    )
    figures = {"loss": fmean(history.train_loss[-3:])}
    for name in ("trained", "recalibrated"):
        if name == "recalibrated":
            recalibrate(model, data)
        figures[f"test_error_{name}"] = evaluate(model, data.test, data, 1).error
        figures[f"train_nll_{name}"] = evaluate(model, data.train, data, 1).nll
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=56)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--p", type=float, nargs="+", default=[0.2, 0.5])
    parser.add_argument("--modes", nargs="+", default=["batch", "row"])
    parser.add_argument("--scales", nargs="+", default=["train", "eval"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    source = open_source("digits")
    variants: dict[str, dict | None] = {"none": None}
    for mode, p, scale in itertools.product(args.modes, args.p, args.scales):
        variants[f"{mode} p={p} scale={scale}"] = {"mode": mode, "p": p, "scale": scale}
    print(
        f"resnet-{args.depth}, {args.epochs} epochs, batches of {args.batch_size}, lr {args.lr}, "
        f"{args.seeds} seeds, torch {torch.__version__}"
    )
    print(f"{'':26}{'loss':>7} {'test error %':>16} {'recalibrated':>16} {'train NLL':>10} recal.")
    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, options in variants.items():
            found = [one(args, seed, source, options, Path(folder)) for seed in range(args.seeds)]
            runs[name] = found
            columns = {key: [run[key] for run in found] for key in found[0]}
            errors = [
                f"{100 * fmean(v):.2f} ± {100 * stdev(v) if len(v) > 1 else 0:.2f}"
                for v in (columns["test_error_trained"], columns["test_error_recalibrated"])
            ]
            print(
                f"{name:26}{fmean(columns['loss']):7.3f} {errors[0]:>16} {errors[1]:>16} "
                f"{fmean(columns['train_nll_trained']):10.3f} "
                f"{fmean(columns['train_nll_recalibrated']):.3f}",
                flush=True,
            )
    if args.json:
        about = {"torch": torch.__version__, "machine": platform.platform(), **vars(args)}
        args.json.write_text(json.dumps({"about": about, "runs": runs}, indent=1, default=str))


if __name__ == "__main__":
    main()
