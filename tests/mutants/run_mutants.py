"""Apply small changes to the source, one at a time, and check that the tests notice each of them.

The changes are in ``table.toml``. Each has to make one of the tests fail that it names; a change
that no test can notice, because the program behaves the same with it, is marked with ``survives``.
The changes are made in a copy of the tree, never in the checkout::

    python tests/mutants/run_mutants.py                 # all of them, which takes some minutes
    python tests/mutants/run_mutants.py --only NAME     # one of them; repeat the option for more
    python tests/mutants/run_mutants.py --file rows/    # those of the files whose path has this
    python tests/mutants/run_mutants.py --check         # only: is the text to be changed there?
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TABLE = Path(__file__).with_name("table.toml")
SOURCES = "src/torchdrop"

# What a copy needs for the tests to run in it.
_COPIED = ("src", "tests", "pyproject.toml", "README.md")

# Loaded by pytest in the copy. An editable install of the checkout would be imported without notice
# if the path were wrong, and every mutant would survive.
_GUARD = """
import importlib.util
from pathlib import Path


def pytest_configure(config):
    found = Path(importlib.util.find_spec("torchdrop").origin).resolve()
    assert found.is_relative_to(Path(__file__).resolve().parent), f"imports {found}, not the copy"
"""
_GUARD_NAME = "imports_the_copy"


@dataclass(frozen=True)
class Mutant:
    """One change of the source, and the tests that have to notice it.

    Attributes:
        name: What the change does, in a few words.
        file: The file, from ``src/torchdrop``.
        before: The text that is replaced. It occurs exactly once in the file.
        after: The text that it is replaced by.
        tests: Test files or single tests, as pytest takes them, from ``tests``.
        why: What would be wrong for a user.
        survives: Why no test can notice the change; empty where one has to.
    """

    name: str
    file: str
    before: str
    after: str
    tests: tuple[str, ...]
    why: str
    survives: str = ""

    def problems(self, root: Path = ROOT) -> list[str]:
        """What is wrong with this entry of the table; nothing is run."""
        found = []
        path = root / SOURCES / self.file
        if not path.is_file():
            found.append(f"{SOURCES}/{self.file} does not exist")
        elif (count := path.read_text().count(self.before)) != 1:
            found.append(f"`before` occurs {count} times in {SOURCES}/{self.file}, not once")
        if self.before == self.after:
            found.append("`after` is the same text as `before`")
        for test in self.tests:
            name, _, function = test.partition("::")
            if not (root / "tests" / name).is_file():
                found.append(f"tests/{name} does not exist")
            elif function and f"def {function.partition('[')[0].rpartition('::')[2]}(" not in (
                root / "tests" / name
            ).read_text(encoding="utf-8"):
                found.append(f"tests/{name} has no {function.partition('[')[0]}")
        if not self.tests:
            found.append("no tests are named")
        if not self.why:
            found.append("`why` is empty")
        return found


@dataclass
class Outcome:
    """What the tests said of one mutant.

    Attributes:
        mutant: The mutant.
        result: "killed", "survived" or "error".
        detail: The test that noticed it, or what went wrong.
        seconds: How long the tests took.
    """

    mutant: Mutant
    result: str
    detail: str
    seconds: float

    @property
    def expected(self) -> bool:
        """Whether the table says so."""
        return self.result == ("survived" if self.mutant.survives else "killed")


def load_table(path: Path = TABLE) -> list[Mutant]:
    """Return the mutants of a table, in its order."""
    entries = tomllib.loads(path.read_text(encoding="utf-8"))["mutant"]
    mutants = [Mutant(**{**entry, "tests": tuple(entry["tests"])}) for entry in entries]
    names = [mutant.name for mutant in mutants]
    if doubled := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"each mutant needs a name of its own, but got twice: {sorted(doubled)}")
    return mutants


def copy_tree(target: Path, root: Path = ROOT) -> Path:
    """Copy what the tests need to ``target``, together with the guard against a wrong import."""
    for name in _COPIED:
        source = root / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, target / name)
    (target / f"{_GUARD_NAME}.py").write_text(_GUARD)
    return target


@contextmanager
def applied(mutant: Mutant, copy: Path) -> Iterator[None]:
    """Change the source in ``copy``, and change it back afterwards."""
    path = copy / SOURCES / mutant.file
    original = path.read_text(encoding="utf-8")
    if original.count(mutant.before) != 1:
        raise ValueError(f"{mutant.name}: `before` occurs {original.count(mutant.before)} times")
    # Compiled files are told apart by the size and the second of the source: too coarse for this.
    compiled = Path(importlib.util.cache_from_source(str(path)))
    try:
        path.write_text(original.replace(mutant.before, mutant.after), encoding="utf-8")
        compiled.unlink(missing_ok=True)
        yield
    finally:
        path.write_text(original, encoding="utf-8")
        compiled.unlink(missing_ok=True)


def run_tests(copy: Path, tests: Sequence[str], timeout: float) -> tuple[int | None, str]:
    """Run pytest on the copy. Return its exit status, None after ``timeout``, and what it wrote."""
    paths = [f"tests/{test}" for test in tests]
    options = ["-x", "-q", "--no-header", "--tb=line", "-p", "no:cacheprovider", "-p", _GUARD_NAME]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(copy / "src"), str(copy)])}
    with subprocess.Popen(
        [sys.executable, "-m", "pytest", *options, *paths],
        cwd=copy,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that what a test has started ends with it
    ) as process:
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return None, process.communicate()[0]
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return process.returncode, output


def judge(mutant: Mutant, copy: Path, timeout: float) -> Outcome:
    """Run the tests of one mutant."""
    start = time.monotonic()
    try:
        with applied(mutant, copy):
            status, output = run_tests(copy, mutant.tests, timeout)
    except (OSError, ValueError) as error:
        return Outcome(mutant, "error", str(error), time.monotonic() - start)
    seconds = time.monotonic() - start
    if status is None:
        return Outcome(mutant, "killed", f"hangs: stopped after {timeout:.0f} s", seconds)
    if status == 0:
        return Outcome(mutant, "survived", mutant.survives, seconds)
    if status == 1:
        failed = re.search(r"^(?:FAILED|ERROR) (?:tests/)?(\S+)", output, re.MULTILINE)
        return Outcome(mutant, "killed", failed.group(1) if failed else "", seconds)
    # Not a failed test: no test was found, or the changed source cannot even be imported.
    last = output.strip().splitlines()[-1:] or [""]
    return Outcome(mutant, "error", f"pytest ended with status {status}: {last[0]}", seconds)


def run_all(mutants: Sequence[Mutant], copies: Sequence[Path], timeout: float) -> Iterator[Outcome]:
    """Judge ``mutants``, as many at a time as there are copies of the tree."""
    free: queue.SimpleQueue[Path] = queue.SimpleQueue()
    for copy in copies:
        free.put(copy)

    def one(mutant: Mutant) -> Outcome:
        copy = free.get()
        try:
            return judge(mutant, copy, timeout)
        finally:
            free.put(copy)

    with ThreadPoolExecutor(len(copies)) as pool:
        yield from pool.map(one, mutants)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", action="append", metavar="NAME", help="a mutant by its name")
    parser.add_argument("--file", action="append", metavar="PATH", help="those of matching files")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time (default 1)")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds a mutant")
    parser.add_argument("--list", action="store_true", help="print the table, run nothing")
    parser.add_argument("--check", action="store_true", help="check the table, run nothing")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit status: 0 where every mutant came out as the table says."""
    options = _parser().parse_args(arguments)
    mutants = load_table()
    if unknown := set(options.only or ()) - {mutant.name for mutant in mutants}:
        raise SystemExit(f"no such mutant: {', '.join(sorted(unknown))}; --list names them all")
    mutants = [m for m in mutants if not options.only or m.name in options.only]
    mutants = [m for m in mutants if not options.file or any(f in m.file for f in options.file)]
    if options.list:
        for mutant in mutants:
            print(f"{mutant.file:38} {mutant.name}{'  (survives)' if mutant.survives else ''}")
        return 0
    problems = [(m.name, problem) for m in mutants for problem in m.problems()]
    for name, problem in problems:
        print(f"{name}: {problem}")
    if problems or options.check:
        print(f"{len(mutants)} mutants, {len(problems)} problems in the table")
        return 1 if problems else 0
    return _run(mutants, max(options.jobs, 1), options.timeout)


def _run(mutants: Sequence[Mutant], jobs: int, timeout: float) -> int:
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="torchdrop-mutants-") as folder:
        copies = [copy_tree(Path(folder, str(i))) for i in range(min(jobs, len(mutants)) or 1)]
        tests = sorted({test for mutant in mutants for test in mutant.tests})
        # Tests that fail anyway would kill every mutant.
        status, output = run_tests(copies[0], tests, timeout * max(len(mutants), 1))
        if status != 0:
            print(output[-4000:])
            print("the tests that the mutants name have to pass on the unchanged source")
            return 1
        print(f"unchanged: the tests pass, {time.monotonic() - start:.0f} s", flush=True)
        outcomes = []
        for outcome in run_all(mutants, copies, timeout):
            outcomes.append(outcome)
            flag = " " if outcome.expected else "!"
            print(
                f"{flag} {outcome.result:8} {outcome.seconds:5.1f} s  {outcome.mutant.file}: "
                f"{outcome.mutant.name}  [{outcome.detail}]",
                flush=True,
            )
    wrong = [outcome for outcome in outcomes if not outcome.expected]
    counts = {r: sum(o.result == r for o in outcomes) for r in ("killed", "survived", "error")}
    print(", ".join(f"{count} {result}" for result, count in counts.items()), end="")
    print(f", {len(wrong)} not as the table says; {time.monotonic() - start:.0f} s")
    for outcome in wrong:
        print(f"! {outcome.mutant.name} ({outcome.result}): {outcome.mutant.why}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
