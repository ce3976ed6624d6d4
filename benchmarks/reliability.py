"""Hold thousands of composed models to the law: right against masking by hand, or refused.

    python benchmarks/reliability.py --blocks 5000 --out benchmarks/results/reliability.json

Draws models with the strategy of tests/laws/composed_blocks.py, each of two blocks made of some of
its constructs, and holds each to tests/laws/composed_law.py, with and without ``example_inputs``.
The models are tried in child processes, so that one that dies is counted and ends nothing. Results
are JSON lines, one for each model; a run that was interrupted goes on where it ended, and begins
anew if the sources changed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import platform
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # once, before the processes fork: checkpoints import it
from machine import processor, version

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "laws")]

from composed_blocks import Spec, specs, text_of  # noqa: E402
from composed_constructs import MIXING  # noqa: E402
from composed_law import InvalidError, hold  # noqa: E402
from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402

# Examples that Hypothesis draws before it begins to mutate those that it has.
DRAWN_AT_ONCE = 11
SECONDS = 60  # a model's limit
WAYS = {"with example_inputs": True, "without": False}
# What a model may end as; the last three break the law.
RIGHT = ("skipped", "whole", "masked", "left out")
REFUSED = ("refused", "refused in a call")
BROKEN = ("wrong", "raw error", "died")


def draw(number: int) -> list[Spec]:
    """Return the specs of chunk ``number``, always the same ones."""
    drawn: list[Spec] = []

    @seed(number)
    @settings(
        max_examples=DRAWN_AT_ONCE,
        database=None,
        phases=[Phase.generate],
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(specs())
    def collect(spec: Spec) -> None:
        drawn.append(spec)

    collect()
    return drawn


def key_of(spec: Spec) -> str:
    return hashlib.sha256(repr(spec).encode()).hexdigest()[:16]


def drawn_for_ever() -> Iterator[Spec]:
    """Yield distinct specs."""
    seen: set[str] = set()
    number = 0
    while True:
        for spec in draw(number):
            if (key := key_of(spec)) not in seen:
                seen.add(key)
                yield spec
        number += 1


# ---------------------------------------------------------------------------------------------
# In a child process


def _try_all(waiting: list[tuple[str, Spec]], pipe: multiprocessing.connection.Connection) -> None:
    """Hold each model to the law, and send what became of it."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for key, spec in waiting:
        row: dict[str, Any] = {"constructs": spec.constructs()}
        for way, example in WAYS.items():
            pipe.send((key, way, None))
            try:
                row[way] = asdict(hold(spec, example))
            except InvalidError as error:
                row = {"invalid": str(error)[:200]}
                break
            except AssertionError as error:  # the reference is not the model
                row = {"mistake": str(error)[:300]}
                break
        pipe.send((key, "done", row))
    pipe.close()


def run(waiting: list[tuple[str, Spec]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the key and the row of each model; a new process goes on where one has died."""
    # Not "fork": autograd does not work in the child of a process that has used it in threads.
    context = multiprocessing.get_context("spawn")
    while waiting:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_try_all, args=(waiting, sender))
        process.start()
        sender.close()
        begun, way = waiting[0][0], "with example_inputs"
        while waiting:
            try:
                if not receiver.poll(SECONDS):
                    raise EOFError
                begun, way, row = receiver.recv()
            except EOFError:
                process.join(1)
                timed_out = process.is_alive()
                process.kill()
                process.join()
                text = "took too long" if timed_out else f"the process ended: {process.exitcode}"
                spec = next(spec for key, spec in waiting if key == begun)
                yield begun, {"constructs": spec.constructs(), way: {"kind": "died", "text": text}}
                waiting = [item for item in waiting if item[0] != begun]
                break
            if way == "done":
                yield begun, row
                waiting = [item for item in waiting if item[0] != begun]
        process.join()
        receiver.close()


# ---------------------------------------------------------------------------------------------
# The figures


def outcome(found: dict[str, Any] | None) -> str:
    """Return what a verdict counts as."""
    if found is None:  # the process died in the other way
        return "died"
    if found["kind"] != "right":
        return str(found["kind"])
    actions = set(found["actions"])
    if actions == {"skip"}:
        return "skipped"
    if "dense" in actions:
        return "left out"
    return "whole" if "layer" in actions else "masked"


def _actions(rows: Iterable[dict[str, Any]], way: str) -> dict[str, int]:
    """Return how many branches were skipped, masked and so on, in models that were not refused."""
    return dict(
        Counter(action for row in rows for action in (row.get(way) or {}).get("actions", []))
    )


def summary(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return the counts of all models and of each construct."""
    valid = [row for row in rows if "constructs" in row]
    totals = {way: Counter(outcome(row.get(way)) for row in valid) for way in WAYS}
    apart = [row for row in valid if not MIXING.keys() & set(row["constructs"])]
    constructs: dict[str, Counter[str]] = {}
    for row in valid:
        for name in row["constructs"]:
            counts = constructs.setdefault(name, Counter())
            counts["models"] += 1
            ends = {outcome(row.get(way)) for way in WAYS}
            first = outcome(row.get("with example_inputs"))
            counts[next((end for end in BROKEN if end in ends), first)] += 1
    return {
        "models": len(valid),
        "totals": {way: dict(counts) for way, counts in totals.items()},
        "branches": {way: _actions(valid, way) for way in WAYS},
        "branches of models that mix no rows": {way: _actions(apart, way) for way in WAYS},
        "constructs": {name: dict(constructs[name]) for name in sorted(constructs)},
    }


def print_table(found: dict[str, Any]) -> None:
    ends = (*RIGHT, *REFUSED, *BROKEN)
    print(f"{found['models']} models")
    print(f"{'':34}" + "".join(f"{end:>18}" for end in ("models", *ends)))
    for way, counts in found["totals"].items():
        cells = "".join(f"{counts.get(end, 0):18}" for end in ends)
        print(f"{way:34}{found['models']:18}{cells}")
    for name, counts in found["constructs"].items():
        print(f"{name:34}" + "".join(f"{counts.get(end, 0):18}" for end in ("models", *ends)))
    for name in ("branches", "branches of models that mix no rows"):
        for way, counts in found[name].items():
            print(f"{name} {way}: {counts}")


def digest() -> str:
    """Return a digest of the sources on which the results depend."""
    files = [*(ROOT / "src").rglob("*.py"), *(ROOT / "tests" / "laws").glob("composed_*.py")]
    text = b"".join(path.read_bytes() for path in sorted(files))
    return hashlib.sha256(text).hexdigest()[:16]


def load(path: Path, sources: str | None) -> dict[str, dict[str, Any]]:
    """Return the rows of a run of these sources (of any, if None), by their keys."""
    rows: dict[str, dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):  # an incomplete line
            row = json.loads(line)
            if sources is None or row["sources"] == sources:
                rows[row["key"]] = row
    return rows


def show(key: str) -> None:
    """Print the text of a model, and what becomes of it in this process."""
    spec = next(spec for spec in drawn_for_ever() if key_of(spec) == key)
    print(text_of(spec))
    print(spec)
    for way, example in WAYS.items():
        print(way, hold(spec, example), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=5000, help="how many models")
    parser.add_argument("--results", type=Path, default=Path("runs/reliability.jsonl"))
    parser.add_argument("--out", type=Path, help="write the figures here")
    parser.add_argument("--seconds", type=float, help="stop after this time")
    parser.add_argument("--any-sources", action="store_true", help="keep results of other sources")
    parser.add_argument("--only", help="models with this construct alone")
    parser.add_argument("--show", help="print the model with this key, and run it here")
    options = parser.parse_args()
    if options.show:
        show(options.show)
        return
    start, sources = time.monotonic(), digest()
    options.results.parent.mkdir(parents=True, exist_ok=True)
    rows = load(options.results, None if options.any_sources else sources)
    source, number, over = drawn_for_ever(), 0, False
    with options.results.open("a") as file:
        while number < options.blocks and not over:
            some = [next(source) for _ in range(min(100, options.blocks))]
            keys = {key_of(spec): spec for spec in some}
            waiting = [(key, spec) for key, spec in keys.items() if key not in rows]
            if options.only:
                waiting = [w for w in waiting if options.only in w[1].constructs()]
            found = run(waiting)
            for key, row in found:
                rows[key] = {"key": key, "sources": sources, **row}
                file.write(json.dumps(rows[key]) + "\n")
                file.flush()
                if options.seconds and time.monotonic() - start > options.seconds:
                    over = True
                    break
            found.close()
            valid = sum("constructs" in rows.get(key, {}) for key in keys)
            if not valid and not over and not options.only:
                why = next((row["invalid"] for row in rows.values() if "invalid" in row), "")
                raise RuntimeError(f"none of {len(keys)} models runs without torchdrop: {why}")
            number += valid
            print(f"{number} models, {time.monotonic() - start:.0f} s", flush=True)
    result = summary(rows.values())
    result["mistakes"] = [row["mistake"] for row in rows.values() if "mistake" in row]
    result["invalid"] = sum("invalid" in row for row in rows.values())
    print_table(result)
    if options.out:
        about = {
            "command": f"python benchmarks/reliability.py --blocks {options.blocks}",
            "torchdrop": version("torchdrop"),
            "torch": version("torch"),
            "hypothesis": version("hypothesis"),
            "python": platform.python_version(),
            "processor": processor(),
            "platform": platform.platform(),
            "load": os.getloadavg()[0],
            "sources": sources,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"about": about, **result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
