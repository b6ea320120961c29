"""`tools/mutate.py`: which mutants it makes, and that each file has tests that exist."""

import ast
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("mutate", ROOT / "tools" / "mutate.py")
assert SPEC is not None
assert SPEC.loader is not None
mutate = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(mutate)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("a < b", ["a <= b"]),
        ("a is not b", ["a is b"]),
        ("é + (b) * c", ["é - (b) * c", "é + (b) / c"]),
        ("a and b or c", ["a and b and c", "a or b or c"]),
        ("a <= b != c", ["a < b != c", "a <= b == c"]),
        ("not a", ["a"]),
        ("f(-x, k=True)", ["f(x, k=True)", "f(-x, k=False)"]),
        ("x = 0.5", ["x = (0.5 + 1)"]),
        ("def f(a: 'int | None' = None) -> int | None:\n    return a", []),
        ("'a < b'", []),
    ],
)
def test_the_mutants_of_a_piece_of_code(code, expected):
    mutants = list(mutate.mutants_of("file.py", code))
    assert [code[: m.start] + m.new + code[m.end :] for m in mutants] == expected
    assert all(m.line == 1 for m in mutants)


def test_every_mutant_is_python_and_another_program():
    mutants = mutate.all_mutants("")
    assert len(mutants) > 500
    codes = {m.file: (ROOT / "python" / "rgd" / m.file).read_text(encoding="utf-8") for m in mutants}
    trees = {file: ast.dump(ast.parse(code)) for file, code in codes.items()}
    for m in mutants[::10]:
        code = codes[m.file]
        assert ast.dump(ast.parse(code[: m.start] + m.new + code[m.end :])) != trees[m.file]


def test_the_tests_of_every_file_are_there():
    for file in {m.file for m in mutate.all_mutants("")}:
        assert all((ROOT / test).is_file() for test in mutate.tests_of(file))
