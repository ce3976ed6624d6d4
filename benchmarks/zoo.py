"""Run the checks of tests/zoo/zoo.py on models of timm, torchvision and transformers.

    python benchmarks/zoo.py --jobs 2 --results runs/zoo.jsonl --table docs/coverage.md

Every model runs in a process of its own, with one thread and limits on time and memory, so that a
crash becomes a row of the table. Results are JSON lines, one for each model. A model that has a
result is not run again, unless ``--again REGEX`` matches it. No weights are downloaded; every model
is small or gets a small input.

Models: of every module of timm the three models with the fewest parameters, at the smallest square
input that they accept, with three layers if they are large and take a number of layers; every model
of torchvision that has a builder; the families of transformers in tests/zoo/zoo_transformers.py,
each with a configuration of a few layers of width 32.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import multiprocessing
import multiprocessing.connection
import os
import platform
import re
import resource
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "zoo"))
import zoo_transformers

import torchdrop
import zoo
from torchdrop.finding.example_calls import Example
from torchdrop.finding.survey import survey

BATCH = 5  # no model has five heads, windows or experts
# Models with more parameters are not run in float64, trained or copied: they do not fit.
LARGE = 110e6
LAYERS = 3  # of the models of timm that take a number of layers
TIMM_SIZES = (64, 96, 128, 160, 192, 224, 256, 288, 299, 320, 384, 448, 512, 640, 768, 1024)


# ---------------------------------------------------------------------------------------------
# Models


@dataclass
class Subject:
    """One model with its inputs."""

    model: nn.Module
    inputs: Any
    size: str
    expected: tuple[int, int] | None = None  # blocks and branches, if known
    always_example: bool = False


def timm_names() -> list[str]:
    """Return the three smallest models of every module, as "timm/module/model"."""
    import timm
    from timm.models import _registry

    names = []
    for module in sorted(_registry._module_to_models):
        sizes = []
        listed = timm.list_models(module=module)
        real = [name for name in listed if not name.startswith("test_")]  # made for tests
        for name in real or listed:
            with torch.device("meta"), contextlib.suppress(Exception):
                model = timm.create_model(name, pretrained=False)
                sizes.append((sum(p.numel() for p in model.parameters()), name))
        names += [f"timm/{module}/{name}" for _, name in sorted(sizes)[:3]]
    return names


def _timm(name: str) -> Subject:
    import timm

    def build(size: int) -> nn.Module:
        tries = [
            {"img_size": size, "drop_path_rate": 0.1}, {"drop_path_rate": 0.1},
            {"img_size": size}, {},
        ]  # fmt: skip
        for attempt in tries:
            try:
                model = timm.create_model(name, pretrained=False, **attempt, **options)
            except (TypeError, ValueError, AssertionError) as error:
                failure = error
            else:
                return model
        raise failure

    options: dict[str, Any] = {}
    config = timm.get_pretrained_cfg(name)
    with torch.device("meta"):
        whole = sum(p.numel() for p in build(config.input_size[-1]).parameters())
        if whole > LARGE:
            options = {"depth": LAYERS}
            try:
                build(config.input_size[-1])
            except Exception:  # it takes no depth
                options = {}
    channels, full = config.input_size[0], config.input_size[-1]
    for size in [s for s in TIMM_SIZES if s < full]:
        try:
            with torch.device("meta"), torch.no_grad():
                build(size).train()(torch.empty(BATCH, channels, size, size))
        except Exception:  # the input is too small, or the size is fixed
            continue
        break
    else:
        size = full
    torch.manual_seed(0)
    label = ", ".join([f"{size}px", *(f"{k}={v}" for k, v in options.items())])
    return Subject(build(size), torch.randn(BATCH, channels, size, size), label)


def torchvision_names() -> list[str]:
    from torchvision import models

    kinds = (
        ("classification", models), ("segmentation", models.segmentation),
        ("detection", models.detection), ("video", models.video),
    )  # fmt: skip
    return [f"torchvision/{kind}/{n}" for kind, m in kinds for n in models.list_models(module=m)]


def _torchvision(kind: str, name: str) -> Subject:
    from torchvision import models

    options: dict[str, Any] = {"weights": None}
    size: tuple[int, ...] = (64, 64)
    if kind in ("detection", "segmentation"):
        options["weights_backbone"] = None
    if name.startswith("vit_"):
        options["image_size"] = edge = 2 * int(name.rpartition("_")[2])
        size = (edge, edge)
    elif name == "maxvit_t":
        options["input_size"] = size = (224, 224)
    elif name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
        size = (299, 299)
    elif kind == "video":
        size = (8, 64, 64)
        if name.startswith(("mvit", "s3d")):
            size = (16, 224, 224)
    elif kind == "segmentation":
        size = (96, 96)
    elif kind == "detection":
        size = (300, 300) if name == "ssd300_vgg16" else (128, 128)
    torch.manual_seed(0)
    model = models.get_model(name, **options)
    if kind == "detection":
        # what comes after takes lists of pictures; add_stochastic_depth takes a part as well
        model = model.backbone
    pixels = torch.randn(BATCH if size[-1] < 200 else 2, 3, *size)
    return Subject(model, pixels, "x".join(map(str, size)) + "px")


def _transformers(name: str) -> Subject:
    family = zoo_transformers.FAMILIES[name]
    torch.manual_seed(0)
    model, inputs = family.build(BATCH)
    size = f"layers={family.blocks}, width={zoo_transformers.WIDTH}"
    return Subject(model, inputs, size, (family.blocks, family.branches), always_example=True)


def build(key: str) -> Subject:
    library, _, rest = key.partition("/")
    if library == "timm":
        return _timm(rest.partition("/")[2])
    if library == "torchvision":
        return _torchvision(*rest.split("/"))
    return _transformers(rest)


def all_names() -> list[str]:
    names = [f"transformers/{name}" for name in zoo_transformers.FAMILIES]
    return names + torchvision_names() + timm_names()


# ---------------------------------------------------------------------------------------------
# One model


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text[:400]}"


def _summary(plan: torchdrop.attaching.plan.Plan) -> dict[str, Any]:
    """Return what the plan found: blocks, branches, actions and reasons."""
    branches = [b for block in plan.blocks for b in block.branches]
    return {
        "blocks": len(plan.blocks),
        "branches": len(branches),
        **Counter(b.action for b in branches),
        "identity": sum(b.shortcut == "identity" for b in branches),
        "masks": sum(len(b.masks) for b in branches),
        "proved": sum(bool(b.proved) for b in branches),
        "reasons": sorted({b.reason for b in branches if b.reason}),
    }


def _masks_named(model: nn.Module) -> int:
    """Return the number of modules that are named like a masking layer."""
    pattern = re.compile(r"(^|\.)(drop_?path\w*|stochastic_depth\w*)$")
    return sum(
        bool(pattern.search(name)) and next(module.children(), None) is None
        for name, module in model.named_modules()
    )


def run_one(key: str) -> dict[str, Any]:
    """Return the row of one model."""
    started = time.process_time()
    subject = build(key)
    model, inputs = zoo.without_randomness(subject.model), subject.inputs
    parameters = sum(p.numel() for p in model.parameters())
    large = parameters > LARGE
    row: dict[str, Any] = {
        "input": subject.size, "parameters": parameters, "expected": subject.expected,
        "kind": type(model).__name__, "drop_paths": _masks_named(model),
    }  # fmt: skip
    if not large:
        with contextlib.suppress(Exception):
            row["additions"] = zoo.identity_additions(model, inputs)
    checks: dict[str, str] = {}
    row["checks"] = checks
    before = time.process_time()
    try:
        for name, check in zoo.checks(model, inputs, large=large):
            if name == "attached":
                row["seconds to attach"] = round(time.process_time() - before, 2)
                row["found"] = _summary(torchdrop.get_plan(model))
            _note(checks, name, check)
    except Exception as error:  # nothing could be attached
        row["found"] = {"error": _first_line(error), "blocks": 0, "branches": 0}
        with contextlib.suppress(Exception):
            row["unreadable"] = survey(model, Example(model, inputs)).unreadable
    example: dict[str, Any] = {"example_inputs": inputs}
    if not subject.always_example:
        try:
            with zoo.attached(model) as plan:
                row["without"] = _summary(plan)
            if "mask" not in row["without"]:
                example = {}
        except Exception as error:
            row["without"] = {"error": _first_line(error), "blocks": 0, "branches": 0}
    if "error" not in row["found"] and not large:
        _note(checks, "masked gradients", lambda: _masked(model, inputs, example))
    row["example"] = bool(example)
    row["seconds"] = round(time.process_time() - started, 1)
    return row


def _note(checks: dict[str, str], name: str, check: Callable[[], Any]) -> None:
    try:
        result = check()
        checks[name] = "ok" if result is None else f"ok {result}"
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        checks[name] = f"{_first_line(error)} [{Path(where.filename).name}:{where.lineno}]"


def _masked(model: nn.Module, inputs: Any, options: dict[str, Any]) -> str:
    """Check gradients against masks; return the error.

    Kept branches are scaled, unless the operations behind the last module of a branch are not
    linear: zeros pass through these unchanged, a scale does not.
    """
    try:
        return f"{zoo.check_masked_gradients(model, inputs, **options):.0e}"
    except AssertionError:
        off = zoo.check_masked_gradients(model, inputs, training_scale=False, **options)
        return f"{off:.0e} with scale='eval'"


# ---------------------------------------------------------------------------------------------
# All models


def _limited(key: str, gigabytes: float, pipe: multiprocessing.connection.Connection) -> None:
    """Run one model in a worker process, and send its row or its error through ``pipe``."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (int(gigabytes * 2**30),) * 2)
    warnings.simplefilter("ignore")
    try:
        row = run_one(key)
    except BaseException as error:
        row = {"failed": _first_line(error), "trace": traceback.format_exc()[-1500:]}
    pipe.send(row)
    pipe.close()


def run_all(keys: list[str], args: argparse.Namespace) -> None:
    context = multiprocessing.get_context("fork")
    waiting = list(reversed(keys))
    running: dict[str, tuple[Any, Any, float]] = {}
    done = 0
    while waiting or running:
        while waiting and len(running) < args.jobs:
            key = waiting.pop()
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_limited, args=(key, args.memory, sender))
            process.start()
            sender.close()
            running[key] = process, receiver, time.monotonic()
        multiprocessing.connection.wait([r for _, r, _ in running.values()], timeout=1.0)
        for key, (process, receiver, since) in list(running.items()):
            row: dict[str, Any] | None = None
            if receiver.poll():
                try:
                    row = receiver.recv()
                except EOFError:
                    process.join()
                    row = {"failed": f"the process ended with {process.exitcode}"}
            elif time.monotonic() - since > args.seconds:
                row = {"failed": f"took more than {args.seconds} s"}
            if row is None:
                continue
            process.kill()
            process.join()
            receiver.close()
            del running[key]
            done += 1
            with args.results.open("a") as file:
                file.write(json.dumps({"model": key, **row}) + "\n")
            print(f"{done}/{len(keys)} {key}: {verdict(row)}", flush=True)


def load(path: Path) -> dict[str, dict[str, Any]]:
    """Return the latest row of each model."""
    rows: dict[str, dict[str, Any]] = {}
    if path.exists():
        for line in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # an incomplete line
                row = json.loads(line)
                rows[row["model"]] = row
    return rows


# ---------------------------------------------------------------------------------------------
# The table


def verdict(row: dict[str, Any]) -> str:
    """Return "rows" if only kept rows are computed and every check holds, else what failed."""
    if "failed" in row:
        return f"failed: {row['failed']}"
    found = row["found"]
    if "error" in found:
        none = "no residual branches found" in found["error"]
        unread = "could not be read" in found["error"]
        if none and not unread and not row.get("additions"):
            return "none"
        return f"refused: {found['error']}"
    wrong = {k: v for k, v in row["checks"].items() if not v.startswith("ok")}
    if wrong:
        return "; ".join(f"{k}: {v}" for k, v in wrong.items())
    if row["expected"] and tuple(row["expected"]) != (found["blocks"], found["branches"]):
        return f"count: expected {row['expected']}, found {found['blocks']}, {found['branches']}"
    if found.get("mask"):
        return f"mask: {'; '.join(found['reasons'])}"
    return "rows"


def _versions() -> str:
    names = ("torchdrop", "torch", "timm", "torchvision", "transformers")
    found = [f"{name} {importlib.metadata.version(name)}" for name in names]
    return ", ".join(found) + f", Python {platform.python_version()}"


INTRODUCTION = (
    "Look up your model: what `add_stochastic_depth` finds in the models of three libraries, and "
    "which of its promises hold. `benchmarks/zoo.py` writes this page; its docstring says which "
    "models are run."
)
COLUMNS = (
    "*blocks*, *branches*: the residual blocks and branches that were found. *skip / mask / "
    "layer*: branches that are computed on the kept rows only; branches that are computed for all "
    "rows and masked; blocks that are dropped as a whole. *proved*: branches that were proved on "
    "the example inputs (see [Prove](how-it-works.md#prove)). *holds*: whether every check of "
    '`tests/zoo/zoo.py` holds. *reason*: what the plan says, or what failed; "with '
    'example_inputs" where the model needs these.'
)


def write_table(rows: dict[str, dict[str, Any]], path: Path, left: int = 0) -> None:
    """Write the page from the results; ``left`` is the number of listed models without any."""
    out = [
        "# Coverage",
        "",
        INTRODUCTION,
        "",
        _totals(rows),
        "",
        f"{len(rows)} of the {len(rows) + left} listed models were run. Versions: {_versions()}.",
        "",
        COLUMNS,
        "",
    ]
    titles = {"torchvision": "torchvision", "timm": "timm", "transformers": "transformers"}
    for library, title in titles.items():
        mine = {k: r for k, r in rows.items() if k.startswith(f"{library}/")}
        if not mine:
            continue
        out += [
            f"## {title}",
            "",
            "| model | input | blocks | branches | skip / mask / layer | proved | holds | reason |",
            "|---|---|--:|--:|---|--:|---|---|",
        ]
        plain = [k for k, r in mine.items() if verdict(r) == "none"]
        out += [_line(key, row) for key, row in mine.items() if key not in plain]
        if plain:
            names = ", ".join(sorted(key.rpartition("/")[2] for key in plain))
            out += [
                "",
                f"No residual connection ({len(plain)}), so that an error is raised: {names}.",
            ]
        out.append("")
    path.write_text("\n".join(out))


def _line(key: str, row: dict[str, Any]) -> str:
    name = key.partition("/")[2]
    found = row.get("found", {})
    said = verdict(row)
    holds = "all" if said == "rows" or said.startswith("mask: ") else "no"
    reason = "; ".join(found.get("reasons", [])) if holds == "all" else said
    if row.get("example") and not key.startswith("transformers"):
        reason = "; ".join(filter(None, ["with example_inputs", reason]))
    actions = " / ".join(str(found.get(action, 0)) for action in ("skip", "mask", "layer"))
    reason = re.sub(r"\s+", " ", reason).replace("|", "\\|")
    reason = re.sub(r"\S*/site-packages/", "", reason)[:300]
    return (
        f"| {name} | {row.get('input', '')} | {found.get('blocks', '')} "
        f"| {found.get('branches', '')} | {actions} | {found.get('proved', '')} | {holds} "
        f"| {reason} |"
    )


def _totals(rows: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| | models | no residual | residual | only kept rows are computed | some branches masked "
        "| not yet | branches | proved |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for library in ("torchvision", "timm", "transformers"):
        said = [verdict(r) for k, r in rows.items() if k.startswith(f"{library}/")]
        if not said:
            continue
        none, full = said.count("none"), said.count("rows")
        masked = sum(v.startswith("mask: ") for v in said)
        residual = len(said) - none
        share = f"{full} ({full / max(residual, 1):.1%})"
        rest = residual - full - masked
        found = [r.get("found", {}) for k, r in rows.items() if k.startswith(f"{library}/")]
        branches, proved = (sum(f.get(k, 0) for f in found) for k in ("branches", "proved"))
        lines.append(
            f"| {library} | {len(said)} | {none} | {residual} | {share} | {masked} | {rest} "
            f"| {branches} | {proved} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("runs/zoo.jsonl"))
    parser.add_argument("--table", type=Path, help="write the table here, from all results")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=float, default=600.0, help="a model's limit")
    parser.add_argument("--memory", type=float, default=8.0, help="GiB of addresses a model")
    parser.add_argument("--only", default="", help="models whose name matches this expression")
    parser.add_argument("--again", help="run these again, although there is a result")
    parser.add_argument("--failed", action="store_true", help="run what did not hold again")
    parser.add_argument("--one", help="run this model here, in this process, and print its row")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.one:
        warnings.simplefilter("ignore")
        print(json.dumps(run_one(args.one), indent=1))
        return
    args.results.parent.mkdir(parents=True, exist_ok=True)
    rows = load(args.results)
    listed = args.results.with_suffix(".models.json")
    if not listed.exists():
        listed.write_text(json.dumps(all_names(), indent=0))
    names = json.loads(listed.read_text())
    names = [f"transformers/{n}" for n in zoo_transformers.FAMILIES] + [
        n for n in names if not n.startswith("transformers/")
    ]
    wanted = [
        n for n in names
        if re.search(args.only, n) and (
            n not in rows
            or (args.again is not None and re.search(args.again, n))
            or (args.failed and verdict(rows[n]) not in ("rows", "none"))
        )
    ]  # fmt: skip
    for library in ("torchvision", "timm", "transformers"):
        with contextlib.suppress(ImportError):  # once, before the processes fork
            importlib.import_module(library)
    run_all(wanted, args)
    if args.table:
        rows = load(args.results)
        run = {name: rows[name] for name in names if name in rows}
        write_table(run, args.table, left=len(names) - len(run))


if __name__ == "__main__":
    main()
