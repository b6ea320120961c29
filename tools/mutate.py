"""Change one place of the Python package at a time; the tests of its module must notice.

    python tools/mutate.py --count 40 --seed 1

A mutant is a changed comparison, sign, operator, constant, `and` or `or`. The package is copied to
target/mutants-python, and the mutant takes the place of the original there. Torch and JAX are imported once:
each mutant runs in a fork of this process, so it costs the time of its tests alone.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
COPY = ROOT / "target" / "mutants-python"

# The files to change, and the tests that touch them.
_FAMILY = [
    f"tests/weightings/test_{name}.py"
    for name in ("members", "worst_cases", "extreme_losses", "weightings", "states", "scale", "own_weighting")
]
TESTS: dict[str, list[str]] = {
    "weightings/*.py": _FAMILY,
    "weightings/excess.py": ["tests/weightings/test_excess.py", *_FAMILY],
    "weightings/entropy_gate.py": ["tests/weightings/test_entropy_gate.py", *_FAMILY],
    "weightings/_fields.py": [
        "tests/weightings/test_weightings.py",
        "tests/weightings/test_own_weighting.py",
    ],
    "boosting/*.py": ["tests/clients/test_boosting.py", "tests/clients/test_sklearn.py"],
    "optax.py": ["tests/jax/test_optax.py", "tests/weightings/test_extreme_losses.py"],
    "stats.py": [
        "tests/numpy/test_numpy_statistics.py",
        "tests/numpy/test_numpy.py",
        "tests/weightings/test_reference.py",
    ],
}

_SETS = 12
"""How many parameter sets of each test a mutant must survive that survived one set."""

_OTHER: dict[type[ast.AST], tuple[str, str]] = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.Pow: ("**", "*"),
    ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"),
    ast.And: ("and", "or"),
    ast.Or: ("or", "and"),
}


class Mutant(NamedTuple):
    """One change: the characters from `start` to `end` of a file become `new`."""

    file: str
    start: int
    end: int
    line: int
    old: str
    new: str

    def __str__(self) -> str:
        """The place and the change, with the line it is in."""
        text = (ROOT / "python" / "rgd" / self.file).read_text(encoding="utf-8").splitlines()[self.line - 1]
        return f"{self.file}:{self.line}: {self.old} -> {self.new}    {text.strip()}"


def mutants_of(file: str, code: str) -> Iterator[Mutant]:
    """All mutants of a file of the package. Annotations, which nothing reads, are left out."""
    lines = code.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))

    def place(line: int, column: int) -> int:
        """The index of a place that `ast` gives in bytes of UTF-8."""
        return starts[line - 1] + len(lines[line - 1].encode()[:column].decode())

    def between(left: ast.AST, right: ast.AST, operator: ast.AST) -> Iterator[Mutant]:
        """The mutant of an operator that stands between two operands."""
        old, new = _OTHER.get(type(operator), ("", ""))
        start = place(left.end_lineno, left.end_col_offset)  # type: ignore[attr-defined]
        end = place(right.lineno, right.col_offset)  # type: ignore[attr-defined]
        found = re.search(re.escape(old).replace(r"\ ", r"\s+"), code[start:end]) if old else None
        if found:
            start += found.start()
            yield Mutant(file, start, start + len(found.group()), code.count("\n", 0, start) + 1, old, new)

    def within(node: ast.AST, new: str) -> Iterator[Mutant]:
        """The mutant that replaces a whole expression."""
        start = place(node.lineno, node.col_offset)  # type: ignore[attr-defined]
        end = place(node.end_lineno, node.end_col_offset)  # type: ignore[attr-defined]
        yield Mutant(file, start, end, node.lineno, code[start:end], new)  # type: ignore[attr-defined]

    def visit(node: ast.AST) -> Iterator[Mutant]:
        if isinstance(node, ast.Compare):
            for left, operator, right in zip(
                [node.left, *node.comparators], node.ops, node.comparators, strict=False
            ):
                yield from between(left, right, operator)
        elif isinstance(node, ast.BinOp):
            yield from between(node.left, node.right, node.op)
        elif isinstance(node, ast.BoolOp):
            for left, right in zip(node.values, node.values[1:], strict=False):
                yield from between(left, right, node.op)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
            yield from within(node, ast.unparse(node.operand))
        elif isinstance(node, ast.Constant):
            if isinstance(node.value, bool):
                yield from within(node, str(not node.value))
            elif isinstance(node.value, int | float):
                yield from within(node, f"({node.value!r} + 1)")
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from visit(child)

    yield from visit(ast.parse(code))


def tests_of(file: str) -> list[str]:
    """The tests of a file: those of its own entry, or of its folder's."""
    return TESTS.get(file) or TESTS[f"{Path(file).parent.name}/*.py"]


def all_mutants(only: str) -> list[Mutant]:
    """The mutants of all files that have tests, in order."""
    package = ROOT / "python" / "rgd"
    files = sorted({path for pattern in TESTS for path in package.glob(pattern)})
    names = [path.relative_to(package).as_posix() for path in files if path.name != "__init__.py"]
    return [
        mutant
        for name in names
        if re.search(only, name)
        for mutant in mutants_of(name, (package / name).read_text(encoding="utf-8"))
    ]


def run(tests: list[str], seconds: float, sets: int = 1) -> str:
    """The outcome of the tests with the package's copy, in a fork: "passed", "failed" or "timeout".

    Each test runs with so many of its parameter sets.
    """
    child = os.fork()
    if child == 0:
        os.setsid()
        quiet = os.open(COPY / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        os.chdir(ROOT)
        sys.path.insert(0, str(COPY))
        os.environ["PYTHONPATH"] = str(COPY)
        code = pytest.main(
            [
                "-x",
                "-q",
                "--few",
                str(sets),
                "--assert=plain",
                "-p",
                "no:cacheprovider",
                "-p",
                "no:xdist",
                *tests,
            ]
        )
        os._exit(int(code))
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return "passed" if os.waitstatus_to_exitcode(status) == 0 else "failed"
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timeout"


def main() -> int:
    """Runs a sample of the mutants, and prints the survivors."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=40, help="how many mutants")
    parser.add_argument("--seed", type=int, default=1, help="which of them")
    parser.add_argument("--only", default="", help="a regular expression of the files")
    parser.add_argument("--list", action="store_true", help="print the sample, and run nothing")
    options = parser.parse_args()
    mutants = all_mutants(options.only)
    sample = random.Random(options.seed).sample(mutants, min(options.count, len(mutants)))
    print(f"{len(sample)} of {len(mutants)} mutants, seed {options.seed}", flush=True)
    if options.list:
        print(*sample, sep="\n")
        return 0

    shutil.rmtree(COPY, ignore_errors=True)
    shutil.copytree(ROOT / "python" / "rgd", COPY / "rgd", ignore=shutil.ignore_patterns("__pycache__"))
    sys.dont_write_bytecode = True
    # What the tests import at length, and what does not import rgd.
    for module in (
        "numpy",
        "torch",
        "jax",
        "optax",
        "hypothesis",
        "mpmath",
        "matplotlib",
        "sklearn",
        "pytest",
    ):
        __import__(module)
    assert "rgd" not in sys.modules
    # A broken copy first: tests that import another rgd, or fail anyway, notice nothing.
    limits: dict[str, float] = {}
    for file in sorted({mutant.file for mutant in sample}, key=tests_of):
        key = " ".join(tests_of(file))
        if key not in limits:
            begin = time.monotonic()
            if run(tests_of(file), 600) != "passed":
                sys.exit(f"the tests fail without a mutant: {COPY / 'log'}\n{key}")
            limits[key] = 30 + 5 * (time.monotonic() - begin)
    survivors: list[Mutant] = []
    for number, mutant in enumerate(sample, 1):
        path = COPY / "rgd" / mutant.file
        code = path.read_text(encoding="utf-8")
        path.write_text(code[: mutant.start] + mutant.new + code[mutant.end :], encoding="utf-8")
        limit = limits[" ".join(tests_of(mutant.file))]
        outcome = run(tests_of(mutant.file), limit)
        if outcome == "passed":
            outcome = run(tests_of(mutant.file), _SETS * limit, _SETS)
        path.write_text(code, encoding="utf-8")
        if outcome == "passed":
            survivors.append(mutant)
        print(f"{number:3} {'SURVIVED' if outcome == 'passed' else outcome:8} {mutant}", flush=True)
    print(f"{len(sample) - len(survivors)} of {len(sample)} mutants were noticed; the survivors:")
    print(*survivors, sep="\n")
    # Some change no result: one in seven, when this was written.
    return 1 if len(survivors) > len(sample) / 4 else 0


if __name__ == "__main__":
    sys.exit(main())
