"""Every Python block of README.md and of docs/ runs, and what they point at exists."""

import pathlib
import re
import shlex

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch

ROOT = pathlib.Path(__file__).parents[1]
PAGES = {
    path.name: path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]
}
README = PAGES["README.md"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def sections(page: str) -> list[tuple[str, str]]:
    """Title and text of each `##` section; what comes before the first is the introduction."""
    introduction, *rest = re.split(r"^## ", PAGES[page], flags=re.MULTILINE)
    return [("introduction", introduction), *(tuple(part.split("\n", 1)) for part in rest)]


def blocks(text: str, language: str, page: str = "README.md") -> list[tuple[int, str]]:
    """The code of each fenced block, with the line of the page it starts on."""
    return [
        (PAGES[page][: PAGES[page].index(match[0])].count("\n") + 2, match[2])
        for match in FENCE.finditer(text)
        if match[1] == language
    ]


WITH_CODE = [
    pytest.param(page, text, id=f"{page}: {title}")
    for page in sorted(PAGES)
    for title, text in sections(page)
    if blocks(text, "python", page)
]


@pytest.mark.parametrize(("page", "text"), WITH_CODE)
def test_a_sections_code_runs_top_to_bottom_on_its_own(page: str, text: str):
    matplotlib.use("agg")
    torch.manual_seed(0)
    namespace = {"__name__": "page"}
    for line, code in blocks(text, "python", page):
        # Padded, so that a traceback names the page's own line.
        exec(compile("\n" * (line - 1) + code, str(ROOT / page), "exec"), namespace)
    plt.close("all")


def test_working_code_stands_within_the_first_15_lines():
    line, code = blocks(README, "python")[0]
    assert line + code.count("\n") <= 15
    assert "RGDLoss()" in code
    assert "CrossEntropyLoss()" in code


def test_every_file_it_links_to_exists():
    for page, text in PAGES.items():
        folder = ROOT if page == "README.md" else ROOT / "docs"
        local = [link for link in re.findall(r"\]\(([^)#\s]+)\)", text) if "://" not in link]
        assert [link for link in local if not (folder / link).exists()] == []
    assert "docs/torch.md" in README


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
