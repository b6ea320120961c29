"""How the files of the house hang together: their arrows run one way, and each can be read in one sitting."""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Iterator, Mapping, Set
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUST = sorted(
    file
    for file in (ROOT / "src").rglob("*.rs")
    if not {"tests", "tests.rs"} & set(file.relative_to(ROOT).parts)
)

PYTHON = sorted((ROOT / "python" / "rgd").rglob("*.py"))

Module = tuple[str, ...]
"""The names on the way from the crate, or from the package, to a module."""


def circle_in(arrows: Mapping[str, Set[str]]) -> list[str]:
    """The files of a circle of arrows, the first once more at the end; none where there is no circle."""
    try:
        graphlib.TopologicalSorter(arrows).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def rust_module(file: Path) -> Module:
    parts = file.relative_to(ROOT / "src").with_suffix("").parts
    return parts[:-1] if parts[-1] in ("mod", "lib") else parts


def rust_code(text: str) -> str:
    """Rust without comments, and without the tests that a file ends with: these may use anything."""
    return re.sub(r"//.*", "", text.split("#[cfg(test)]\nmod tests {", maxsplit=1)[0])


def expanded(path: str) -> list[str]:
    """The paths of a `use`: `a::{b, c::{d, e}}` is a::b, a::c::d and a::c::e."""
    start = path.find("{")
    if start < 0:
        return [path.split(" as ", maxsplit=1)[0]]
    parts, depth, part = list[str](), 0, ""
    for letter in path[start + 1 : path.rindex("}")] + ",":
        depth += (letter == "{") - (letter == "}")
        if letter == "," and depth == 0:
            parts += [part] if part else []
            part = ""
        else:
            part += letter
    return [inner for part in parts for inner in expanded(path[:start] + part)]


def rust_paths(code: str, module: Module, children: Set[str]) -> Iterator[tuple[str, ...]]:
    """Every path of a file's code that begins at the crate, at a module above, or at one below."""
    inline = re.search(r"\bmod (\w+) \{", code)
    if inline is not None:
        end, depth = inline.end(), 1
        while depth:
            depth += (code[end] == "{") - (code[end] == "}")
            end += 1
        yield from rust_paths(code[inline.end() : end - 1], (*module, inline[1]), set())
        yield from rust_paths(code[: inline.start()] + code[end:], module, children)
        return
    uses = [re.sub(r"\s+(?!as )(?<! as )", "", use) for use in re.findall(r"\buse ([^;]+);", code)]
    others = re.findall(r"(?<!\w)(?<!::)[a-z_]\w*(?:::\w+)+", re.sub(r"\buse [^;]+;", "", code))
    for path in [path for use in uses for path in expanded(use)] + others:
        first, *rest = path.split("::")
        if first == "crate":
            yield tuple(rest)
        elif first in ("super", "self"):
            levels = [first, *rest].count("super")
            yield (*module[: len(module) - levels], *rest[max(0, levels - 1) :])
        elif first in children:
            yield (*module, first, *rest)


def rust_arrows(files: Mapping[Module, str]) -> dict[str, set[str]]:
    """From each file to those whose items it names, re-exports included; to declare a module is no arrow.

    Args:
        files: The text of each file by its module.
    """
    arrows: dict[str, set[str]] = {}
    for module, text in files.items():
        own = arrows.setdefault("::".join(("crate", *module)), set())
        children = {other[-1] for other in files if other and other[:-1] == module}
        for path in rust_paths(rust_code(text), module, children):
            while path not in files:
                path = path[:-1]  # noqa: PLW2901 - up from an item to the file that has it
            if path != module:
                own.add("::".join(("crate", *path)))
    return arrows


def test_no_files_of_the_crate_use_each_other_in_a_circle():
    arrows = rust_arrows({rust_module(file): file.read_text() for file in RUST})
    assert arrows["crate::weightings"] >= {"crate::weightings::kl", "crate::numeric"}
    assert arrows["crate::bindings"] >= {"crate::bindings::tensor", "crate::bindings::xla"}
    assert circle_in(arrows) == []


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("use super::b::B;", "use crate::{c, room::{a, d::D}};"),
        ("fn f() { crate::room::b::g(); }", "use super::{a::{A, f as g}};"),
        ("mod inner { use super::super::b; }", "macro_rules! m { () => { $crate::room::a::f() } }"),
        ("pub use super::b::B; // b", "fn g() -> super::a::A {}"),
    ],
)
def test_a_circle_of_rust_files_is_found(a: str, b: str):
    room = "mod a;\nmod b;\nmod d;\npub use a::A;\nfn f() { d::g(); }"
    files = {(): "mod room;\nmod c;", ("c",): "", ("room",): room, ("room", "d"): "use std::mem::swap;"}
    arrows = rust_arrows({**files, ("room", "a"): a, ("room", "b"): b})
    assert set(circle_in(arrows)) == {"crate::room::a", "crate::room::b"}
    tests = "#[cfg(test)]\nmod tests {\n    use super::*;\n    use crate::room::b::B;\n}"
    arrows = rust_arrows({**files, ("room", "a"): f"use std::fmt; // {a}\n{tests}", ("room", "b"): b})
    assert circle_in(arrows) == []
    assert arrows["crate::room"] == {"crate::room::a", "crate::room::d"}


def test_a_child_that_uses_its_parent_and_is_used_by_it_is_a_circle():
    arrows = rust_arrows(
        {(): "mod a;\npub use a::A;\npub struct B;", ("a",): "use super::B;\npub struct A(B);"}
    )
    assert set(circle_in(arrows)) == {"crate", "crate::a"}


@pytest.mark.parametrize("file", RUST, ids=lambda file: str(file.relative_to(ROOT / "src")))
def test_a_rust_file_has_at_most_600_lines_of_120_columns(file: Path):
    lines = file.read_text().splitlines()
    assert len(lines) <= 600
    assert [line for line in lines if len(line) > 120] == []


def python_module(file: Path) -> str:
    parts = file.relative_to(ROOT / "python").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def python_arrows(files: Mapping[str, str]) -> dict[str, set[str]]:
    """From each file to those that it imports, wherever in the file that is written.

    Args:
        files: The text of each file by the name of its module.
    """
    arrows: dict[str, set[str]] = {}
    for module, text in files.items():
        own = arrows.setdefault(module, set())
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                own |= {alias.name for alias in node.names} & files.keys()
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{module} imports relatively"
                # A module of a package, or a name that the package's own file gives.
                own |= {
                    inner if inner in files else node.module
                    for inner in (f"{node.module}.{alias.name}" for alias in node.names)
                } & files.keys()
        own.discard(module)
    return arrows


def test_no_files_of_the_package_import_each_other_in_a_circle():
    extension = ROOT / "python" / "rgd" / "_rgd.pyi"
    arrows = python_arrows({python_module(file): file.read_text() for file in [*PYTHON, extension]})
    assert arrows["rgd.torch.loss"] >= {"rgd.torch._problem", "rgd.stats"}
    assert circle_in(arrows) == []


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("from rgd.b import B", "def f():\n    from rgd import a"),
        ("import rgd.b", "if TYPE_CHECKING:\n    from rgd.a import A"),
    ],
)
def test_a_circle_of_python_files_is_found(a: str, b: str):
    files = {"rgd": "from rgd.a import A", "rgd.a": a, "rgd.b": b}
    assert set(circle_in(python_arrows(files))) == {"rgd.a", "rgd.b"}
    assert circle_in(python_arrows({**files, "rgd.b": "import torch"})) == []


@pytest.mark.parametrize("file", PYTHON, ids=lambda file: str(file.relative_to(ROOT / "python")))
def test_a_python_file_has_at_most_600_lines(file: Path):
    assert len(file.read_text().splitlines()) <= 600


def test_no_function_takes_more_positional_parameters_than_one_can_read():
    # `ruff` looks at all others (PLR0917).
    exempt = [line for file in PYTHON for line in file.read_text().splitlines() if "PLR0917" in line]
    assert all("the signature is torch's" in line for line in exempt)


def test_no_front_asks_which_member_it_has_been_given():
    for file in PYTHON:
        parts = file.relative_to(ROOT / "python" / "rgd").parts
        if parts[0] in ("torch", "jax"):
            assert not re.search(r'== "kl"|KernelPlan', file.read_text()), file
