"""Kill ``torchdrop compare`` with SIGKILL at random moments, and resume it.

One comparison runs undisturbed. Each of the others is killed at a random moment and resumed to the
end. The script checks that

* all figures, clock times aside, equal those of the first comparison bit for bit;
* runs that were finished at the kill are still there with the same clock times, so that they were
  not run again;
* results.json can be read at any moment;
* no other process can use the folder while the process lives, and any can once it is dead;
* nothing but the results is left in the folder.

    python benchmarks/soak/kill.py --kills 20 --out runs/kill.json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import torchdrop
from torchdrop.app.errors import UserError
from torchdrop.app.results import locked

# Checkpoints every half second, not every minute, so that some kills fall on one.
CODE = """
import functools, sys
from torchdrop.app import cli, compare, training
compare.Run = functools.partial(training.Run, checkpoint_seconds=0.5)
sys.exit(cli.main())
"""
ARGUMENTS = [
    *("compare", "--methods", "stochastic_depth_batch,subsample"),
    *("--model", "resnet-8", "--train-size", "40", "--test-size", "40", "--epochs", "8"),
    *("--batch-size", "10", "--seeds", "2", "--cost-steps", "1", "--threads", "1"),
    *("--accelerator", "cpu"),
]


def start(out: Path, *more: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", CODE, *ARGUMENTS, "--out", str(out), *more],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def content_of(out: Path) -> dict | None:
    file = out / "results.json"
    return json.loads(file.read_text()) if file.exists() else None


def without_clocks(content: dict) -> dict:
    content = json.loads(json.dumps(content))
    for costs in content["costs"].values():
        for cost in costs.values():
            del cost["step_ms"]
    for method in content["methods"].values():
        for figures in (method["mean"], method["std"], method["ratio"]):
            del figures["step_ms"]
        for seed in method["seeds"]:
            del seed["step_ms"], seed["seconds"]
    return content


def finished(content: dict | None) -> dict[str, dict]:
    return {
        f"{name}-{seed['seed']}": seed
        for name, method in (content or {"methods": {}})["methods"].items()
        for seed in method["seeds"]
    }


def refused(out: Path) -> bool:
    try:
        with locked(out):
            return False
    except UserError:
        return True


def one(out: Path, moment: float, whole: dict) -> dict:
    process = start(out)
    try:
        time.sleep(moment)
        begun = (out / ".lock").exists() and process.poll() is None
        content = content_of(out)
        # A process that has only created the lock file may not hold the lock yet; a process
        # that is done has released it.
        working = begun and content is not None and content["status"] == "partial"
        guarded = not working or refused(out) or process.poll() is not None
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    before = content_of(out)  # raises unless it can be read
    free = not refused(out) if out.exists() else True
    resumed = start(out, *(["--resume"] if before else []))
    _, errors = resumed.communicate()
    after = content_of(out)
    kept = all(finished(after).get(run) == entry for run, entry in finished(before).items())
    left = sorted(path.name for path in out.iterdir())
    return {
        "moment_s": round(moment, 2),
        "finished_at_the_kill": len(finished(before)),
        "results_there": before is not None,
        "resumed": resumed.returncode == 0,
        "same": resumed.returncode == 0 and without_clocks(after) == whole,
        "nothing_lost_or_repeated": kept,
        "lock_held_and_released": guarded and free,
        "nothing_left": left == [".lock", "report.html", "results.json"],
        "errors": errors[-500:] if resumed.returncode else "",
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        process = start(Path(folder) / "whole")
        _, errors = process.communicate()
        if process.returncode:
            print(errors, file=sys.stderr)
            return 1
        length = time.monotonic() - began
        whole = without_clocks(content_of(Path(folder) / "whole"))
        print(f"left alone: {length:.1f} s", flush=True)
        found = []
        for number in range(options.kills):
            found.append(one(Path(folder) / str(number), draw.uniform(0, length), whole))
            print(number, found[-1], flush=True)
    checks = (
        "resumed",
        "same",
        "nothing_lost_or_repeated",
        "lock_held_and_released",
        "nothing_left",
    )
    summary = {
        "kills": len(found),
        "killed_before_the_first_results": sum(not f["results_there"] for f in found),
        **{name: sum(f[name] for f in found) for name in checks},
        "versions": {"torchdrop": torchdrop.__version__, "torch": torch.__version__},
    }
    print(json.dumps(summary, indent=1))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({**summary, "moments": found}, indent=1) + "\n")
    return int(any(not f[name] for f in found for name in checks))


if __name__ == "__main__":
    sys.exit(main())
