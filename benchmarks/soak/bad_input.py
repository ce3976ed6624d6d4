"""Run the checks of tests/laws/hostile.py with ten thousand new random cases and more.

python benchmarks/soak/bad_input.py --cases 12000 --out runs/bad_input.json
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "laws"))

from hostile import CHECKS, FindingError, RefusedError

import torchdrop


def run(name: str, cases: int, start: int) -> dict:
    check = CHECKS[name][0]
    count: Counter[str] = Counter()
    findings: Counter[str] = Counter()

    @seed(start)
    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(st.data())
    def each(data) -> None:
        count["cases"] += 1
        try:
            check(data.draw)
            count["right"] += 1
        except RefusedError:
            count["refused"] += 1
        except FindingError as finding:
            count["findings"] += 1
            findings[str(finding)[-600:]] += 1

    began = time.process_time()
    each()
    return {**count, "cpu_s": round(time.process_time() - began, 1), "what": dict(findings)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=12_000)
    parser.add_argument("--seed", type=int, default=random.randrange(2**31))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found = {}
    for name, (_, share) in CHECKS.items():
        found[name] = run(name, round(options.cases * share), options.seed)
        print(name, json.dumps(found[name]), flush=True)
    total = {
        key: sum(check.get(key, 0) for check in found.values())
        for key in ("cases", "right", "refused", "findings")
    }
    print(json.dumps(total))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        versions = {"torchdrop": torchdrop.__version__, "torch": torch.__version__}
        content = {**total, "seed": options.seed, "versions": versions, "checks": found}
        options.out.write_text(json.dumps(content, indent=1) + "\n")
    return int(total["findings"] > 0)


if __name__ == "__main__":
    sys.exit(main())
