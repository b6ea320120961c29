"""Finished runs on disk, so that an interrupted program goes on where it stopped."""

from __future__ import annotations

import ast
import hashlib
import json
import pathlib
from collections.abc import Iterable, Sequence

import rgd
import torch

from harness.arms import Arm
from harness.problems import Problem
from harness.train import Cell, Outcome

HERE = pathlib.Path(__file__).parent
# The modules of the harness that decide the result of every run, and those that decide none.
ALWAYS = ("arms", "losses", "problems", "train")
NEVER = ("__init__", "lineup", "pictures", "results", "row", "statistics", "store", "sweep")


def fingerprint(program: pathlib.Path | None = None) -> str:
    """Changes with the code that trains, the program's own too, and with the versions that compute."""
    code = [meaning((HERE / f"{name}.py").read_text()) for name in ALWAYS]
    if program is not None:
        code += [meaning(path.read_text()) for path in own_code(program)]
    return hashlib.sha256("\n".join([*code, rgd.__version__, torch.__version__]).encode()).hexdigest()


def own_code(program: pathlib.Path) -> list[pathlib.Path]:
    """A program and what it imports from its folder, of the harness what only some programs train with."""
    found, unread = [program], [program]
    known = {HERE / f"{name}.py" for name in (*ALWAYS, *NEVER)}
    while unread:
        for node in ast.walk(ast.parse(unread.pop().read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module is not None and not node.level:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            for name in names:
                path = program.parent.joinpath(*name.split(".")).with_suffix(".py")
                if path.exists() and path not in known and path not in found:
                    found.append(path)
                    unread.append(path)
    return sorted(found)


def meaning(source: str) -> str:
    """A program without its comments, docstrings and line breaks."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = ""
    return ast.dump(tree)


class Store:
    """Outcomes by problem, arm, cell and seed: one line of JSON each; kept in memory where `path` is None.

    Changed code, of the harness or of the program, finds no old outcomes.
    """

    def __init__(self, path: pathlib.Path | None = None, program: pathlib.Path | None = None) -> None:
        self.path = path
        self.code = fingerprint(program)
        self.outcomes: dict[str, list[Outcome]] = {}
        self.used: set[str] = set()
        if path is not None and path.exists():
            for line in path.read_text().splitlines():
                try:
                    key, outcomes = json.loads(line)
                except json.JSONDecodeError:  # the line that was being written when the program was stopped
                    continue
                self.outcomes[key] = [Outcome(*outcome) for outcome in outcomes]

    def key(self, problem: Problem, arm: Arm, seed: int, cell: Cell, snapshots: Sequence[int]) -> str:
        """What identifies a run: everything that decides its result."""
        parts = (self.code, problem.key(), arm.key(), seed, *cell, tuple(snapshots))
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def get(self, key: str) -> list[Outcome] | None:
        """The outcomes of a finished run, or None."""
        self.used.add(key)
        return self.outcomes.get(key)

    def add(self, new: Iterable[tuple[str, list[Outcome]]]) -> None:
        """Keeps finished runs."""
        lines: list[str] = []
        for key, outcomes in new:
            self.outcomes[key] = outcomes
            self.used.add(key)
            lines.append(json.dumps([key, outcomes]) + "\n")
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.writelines(lines)

    def seconds(self) -> float:
        """How long the runs took that were asked for, in this run of the program or in an earlier one."""
        return sum(self.outcomes[key][-1].seconds for key in self.used if key in self.outcomes)
