"""Every Python block of README.md runs, and what it points at exists."""

import pathlib
import re
import shlex

import pytest
import torch

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def sections() -> list[tuple[str, str]]:
    """Title and text of each `##` section; what comes before the first is the introduction."""
    introduction, *rest = re.split(r"^## ", README, flags=re.MULTILINE)
    return [("introduction", introduction), *(tuple(part.split("\n", 1)) for part in rest)]


def blocks(text: str, language: str) -> list[tuple[int, str]]:
    """The code of each fenced block, with the line of the README it starts on."""
    return [
        (README[: README.index(match[0])].count("\n") + 2, match[2])
        for match in FENCE.finditer(text)
        if match[1] == language
    ]


WITH_CODE = [(title, text) for title, text in sections() if blocks(text, "python")]


@pytest.mark.parametrize("text", [text for _, text in WITH_CODE], ids=[title for title, _ in WITH_CODE])
def test_a_sections_code_runs_top_to_bottom_on_its_own(text: str):
    torch.manual_seed(0)
    namespace = {"__name__": "readme"}
    for line, code in blocks(text, "python"):
        # Padded, so that a traceback names the README's own line.
        exec(compile("\n" * (line - 1) + code, str(ROOT / "README.md"), "exec"), namespace)


def test_working_code_stands_within_the_first_15_lines():
    line, code = blocks(README, "python")[0]
    assert line + code.count("\n") <= 15
    assert "RGDLoss()" in code
    assert "CrossEntropyLoss()" in code


def test_every_file_it_links_to_exists():
    links = re.findall(r"\]\(([^)#\s]+)\)", README)
    local = [link for link in links if "://" not in link]
    assert local
    assert [link for link in local if not (ROOT / link).exists()] == []


def test_every_make_target_it_names_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z]+)\b(?=`|\s+#|\s+&&)", README))
    assert {"demo", "test", "lint", "wheel", "bench", "help"} <= named <= targets


def test_pip_is_given_a_path_and_never_the_name_of_another_project():
    commands = re.findall(r"pip install ([^\n#]+)", README)
    assert commands
    for command in commands:
        arguments = [word for word in shlex.split(command) if not word.startswith("-")]
        assert all("/" in word for word in arguments), command
