"""Code and formulas that stand indented in a docstring are whole: each block parses as Python."""

import ast
import pathlib
import re
import textwrap

import pytest

ROOT = pathlib.Path(__file__).parents[2]
FILES = sorted((ROOT / "python" / "rgd").rglob("*.py"))
# Sections of Google's style, whose text is indented too. doctest runs what stands in an example.
SECTION = re.compile(r"(Args|Attributes|Example|Examples|Note|Raises|References|Returns|Shape|Yields):")
# What mathematics writes otherwise than Python: an operator before its operand, bare (`sum_i p_i`,
# `log p`), one where something holds and else zero (`[k = y]`), a derivative (`dl/dz`).
NOTATION = (
    (re.compile(r"\b((?:sum|mean|max|min|argmax|log)(?:_\w+)?) (?=[\w(])"), r"\1 * "),
    (re.compile(r"\[(\w+) = (\w+)\]"), r"[\1 == \2]"),
    (re.compile(r"\bd(\w+)/d(\w+)"), r"d\1_d\2"),
)


def blocks(docstring):
    """The indented blocks of a docstring outside of its sections, each with the number of its first line."""
    found, in_section = [], False
    for number, line in enumerate(docstring.splitlines()):
        if not line.strip():
            continue
        if not line.startswith("    "):
            in_section = SECTION.fullmatch(line) is not None
            open_block = False
        elif not in_section:
            if not open_block:
                found.append((number, []))
            found[-1][1].append(line)
            open_block = True
    return [(number, textwrap.dedent("\n".join(lines))) for number, lines in found]


def problem(code):
    """Why a block is no Python, or None."""
    for pattern, python in NOTATION:
        code = pattern.sub(python, code)
    try:
        ast.parse(code)
    except SyntaxError as error:
        return f"{error.msg}: {error.text}"
    return None


def docstrings(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, nodes) and (docstring := ast.get_docstring(node)):
            yield getattr(node, "name", "the module"), docstring


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / "python")))
def test_indented_code_and_formulas_parse(path):
    broken = [
        f"{name}, line {number + 1} of its docstring: {reason}"
        for name, docstring in docstrings(path)
        for number, code in blocks(docstring)
        if (reason := problem(code))
    ]
    assert broken == []


def test_there_are_blocks_to_parse():
    found = [code for path in FILES for _, docstring in docstrings(path) for _, code in blocks(docstring)]
    assert len(found) >= 5
    assert any("tx.update(grads" in code for code in found)


RE_FLOWED = {
    "optax": """Re-weighted Gradient Descent as optax transformations.

    losses, grads = jax.vmap(jax.value_and_grad(loss), in_axes=(None, 0, 0))(params, x, y)   # leading axis:
    batch updates, state = tx.update(grads, state, params, losses=losses)

The update that the inner optimizer sees is the mean.
""",
    "composite": """With losses `l_1..l_n` the weights are constants to autograd,

    KL(tau, scale):             w_i = exp(scale * min(l_i, tau)) KL(..., normalize=True):    w_i = exp(scale
    * min(l_i, tau)) / mean_j exp(scale * min(l_j, tau)) KLBall(radius):             w = n * softmax(l /
    gamma), gamma the root of KL(softmax(l / gamma) || uniform) = radius
""",
    "reference": """With losses `l_1..l_n` the weights are

    KL(tau, scale):             w_i = exp(scale * min(l_i, tau))
    KLBall(radius):             w = n * argmax_q sum_i q_i * l_i  subject to  sum_i q_i * log(n * q_i) <=
    radius

References:
    A paper.
""",
}


@pytest.mark.parametrize("docstring", RE_FLOWED.values(), ids=RE_FLOWED)
def test_a_block_broken_by_a_re_flow_is_found(docstring):
    ((_, code),) = blocks(docstring)
    assert problem(code)


def test_a_formula_in_the_notation_of_mathematics_is_accepted():
    ((number, code),) = blocks("Head.\n\n    sum_i p_i * w_i * l_i / sum_i p_i\n\nArgs:\n    x: Not code.")
    assert number == 2
    assert problem(code) is None
    assert problem("losses batch") is not None
