"""Every Python block of README.md, CONTRIBUTING.md and docs/ runs, and what they point at exists."""

import inspect
import pathlib
import re
import shlex
from collections.abc import Callable

import jax  # noqa: F401 - its arrays must not disturb what torch compiles in the same process
import matplotlib
import matplotlib.pyplot as plt
import pytest
import rgd
import torch
from rgd.torch import RGDLoss, sample_weights
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = pathlib.Path(__file__).parents[2]
FRONT = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PATHS = {path.name: path for path in [*FRONT, *sorted(ROOT.glob("docs/*.md"))]}
PAGES = {name: path.read_text(encoding="utf-8") for name, path in PATHS.items()}
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


def tables(page: str) -> list[list[str]]:
    """The cells of each row of a page's tables, headers left in. A bar in mathematics is written `\\|`."""
    text = FENCE.sub("", PAGES[page])
    rows = re.findall(r"^ *\|(.*)\|$", text, re.MULTILINE)
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)] for row in rows]


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
        exec(compile("\n" * (line - 1) + code, str(PATHS[page]), "exec"), namespace)
    plt.close("all")


def test_working_code_stands_within_the_first_15_lines():
    line, code = blocks(README, "python")[0]
    assert line + code.count("\n") <= 15
    assert "RGDLoss(" in code
    assert "CrossEntropyLoss()" in code


def test_every_file_it_links_to_exists():
    for page, text in PAGES.items():
        local = [link for link in re.findall(r"\]\(([^)#\s]+)[)#]", text) if "://" not in link]
        assert [link for link in local if not (PATHS[page].parent / link).exists()] == []
    linked = set(re.findall(r"\]\(([^)#\s]+)[)#]", README))
    assert {str(path.relative_to(ROOT)) for path in PATHS.values()} - {"README.md"} <= linked


def test_every_page_has_its_place_in_the_site():
    contents = (ROOT / "docs" / "site" / "build.py").read_text(encoding="utf-8").partition("CONTENTS = {")[2]
    placed = set(re.findall(r'"docs/(\w+)"', contents))
    assert placed == {path.stem for path in ROOT.glob("docs/*.md")}


def test_every_section_it_links_to_exists():
    slugs = {
        page: {
            re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")
            for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        }
        for page, text in PAGES.items()
    }
    links = [
        (page, pathlib.PurePath(target or page).name, section)
        for page, text in PAGES.items()
        for target, section in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", text)
        if "://" not in target
    ]
    assert links
    assert [link for link in links if link[2] not in slugs[link[1]]] == []


def test_the_table_of_weightings_holds_the_whole_family():
    (table,) = [text for title, text in sections("weightings.md") if title == "The members"]
    members = {
        name
        for name in rgd.__all__
        if isinstance(kind := getattr(rgd, name), type) and issubclass(kind, rgd.Weighting)
    }
    assert set(re.findall(r"^\| `rgd\.(\w+)\(", table, re.MULTILINE)) == members - {"Weighting"}


@pytest.mark.parametrize(
    ("page", "function"),
    [
        ("torch.md", RGDLoss.__init__),
        ("torch.md", RGDLoss.forward),
        ("numpy.md", rgd.sample_weights),
        ("jax.md", rgd.jax.cross_entropy),
        ("jax.md", rgd.jax.reweighted_mean),
        ("jax.md", rgd.jax.linear_cross_entropy),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__qualname__,
)
def test_the_tables_of_a_front_leave_out_no_argument(page: str, function: Callable[..., object]):
    arguments = {cell for row in tables(page) for cell in re.findall(r"`(\w+)`", row[0])}
    parameters = inspect.signature(function).parameters.values()
    assert {p.name for p in parameters if p.default is not p.empty} - {"target"} - arguments == set()


def test_the_readme_is_read_in_two_minutes():
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "CONTRIBUTING.md",
        "torch.md",
        "jax.md",
        "numpy.md",
        "weightings.md",
        "speed.md",
        "language_models.md",
        "which.md",
        "groups.md",
        "clients.md",
    ],
)
def test_no_cell_of_a_table_has_more_than_25_words(page: str):
    assert tables(page)
    assert [cell for row in tables(page) for cell in row if len(cell.split()) > 25] == []


def test_the_map_of_the_house_names_every_room():
    (code,) = [code for _, code in blocks(PAGES["architecture.md"], "", "architecture.md")]
    named = {line.split()[0].rstrip("/") for line in code.splitlines() if line}
    assert [name for name in named if not (ROOT / name).exists()] == []
    roots = ("src", "python/rgd")
    files = [
        path.relative_to(ROOT)
        for root in roots
        for path in (ROOT / root).rglob("*")
        if path.suffix in (".rs", ".py", ".pyi")
    ]
    assert [str(f) for f in files if str(f) not in named and (str(f.parent) not in named)] == []
    assert not named & set(roots)


def test_the_page_says_where_ten_changes_go():
    (table,) = [text for title, text in sections("architecture.md") if title == "Where does a change go?"]
    rows = [row for row in table.splitlines() if row.startswith("| ")][1:]
    assert len(rows) == 10
    for row in rows:
        paths = [path for path in re.findall(r"`([^`]+)`", row) if "/" in path]
        assert paths, row
        assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_page_on_backends_prints_what_its_comments_say(capsys):
    checked = 0
    for _, code in blocks(PAGES["backends.md"], "python", "backends.md"):
        exec(code, {})
        said = [line.split("# ")[1].split(":")[0] for line in code.splitlines() if line.startswith("print")]
        assert said == capsys.readouterr().out.splitlines()
        checked += len(said)
    assert checked


class CountOperations(TorchDispatchMode):
    """Counts the operations that torch dispatches, those of a backend on another device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.count += 1
        return function(*arguments, **(keywords or {}))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize(
    ("operators", "weighting_at"),
    [
        ({"cross_entropy"}, lambda step: rgd.KL(tau=1.0 + step)),
        ({"cross_entropy"}, lambda step: rgd.KLBall(0.1 + step)),
        ({"cross_entropy"}, lambda step: rgd.CVaR(0.3 + step)),
        (
            {"cross_entropy_losses", "cross_entropy_gradient"},
            lambda step: rgd.Trimmed(rgd.KLBall(0.1 + step), 0.2),
        ),
    ],
    ids=["KL", "KLBall", "CVaR", "Trimmed"],
)
def test_a_schedule_compiles_nothing_again_and_the_graph_has_the_operators_of_the_page(
    operators: set[str], weighting_at: Callable[[float], rgd.Weighting]
):
    torch.compiler.reset()
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    criterion = RGDLoss()
    compiled = torch.compile(criterion, backend=keep, fullgraph=True)
    logits, target = torch.randn(8, 3, dtype=torch.float64, requires_grad=True), torch.arange(8) % 3
    criterion.weighting = weighting_at(0.0)
    first = compiled(logits, target).item()
    criterion.weighting = weighting_at(0.25)
    second = compiled(logits, target).item()
    (graph,) = graphs
    assert second == pytest.approx(RGDLoss(weighting=weighting_at(0.25))(logits, target).item(), rel=1e-13)
    assert second != first
    called = {
        str(node.target).split(".")[1] for node in graph.graph.nodes if str(node.target).startswith("rgd.")
    }
    assert called == operators
    assert all(f"`rgd::{name}`" in PAGES["backends.md"] for name in operators)


OPERATIONS = {
    "`KL()`": rgd.KL(),
    "`KL(normalize=True)`": rgd.KL(normalize=True),
    "`MidrangeKL`": rgd.MidrangeKL(1.0),
    "`CVaR`": rgd.CVaR(0.1),
    "`CVaR` with smoothing": rgd.CVaR(0.1, smoothing=0.5),
    "`ChiSquare`": rgd.ChiSquare(1.0),
    "`KLBall`": rgd.KLBall(0.1),
    "`ChiSquareBall`": rgd.ChiSquareBall(0.3),
}


def operations(weighting: rgd.Weighting, size: int) -> int:
    losses = torch.linspace(0.0, 3.0, size)
    with CountOperations() as counter:
        sample_weights(losses, weighting)
    return counter.count


def test_the_page_on_backends_counts_the_operations_of_each_search():
    page = PAGES["backends.md"]
    header, numbers = re.search(r"^ +\| (`KL\(\)`.*) \|\n.*\n +\| (.*) \|$", page, re.MULTILINE).groups()
    stated = dict(zip(header.split(" | "), map(int, numbers.split(" | ")), strict=True))
    assert stated.keys() == OPERATIONS.keys()
    counted = {name: operations(weighting, 512) for name, weighting in OPERATIONS.items()}
    # Versions of torch and of array-api-compat differ by an operation here and there.
    assert {name: pytest.approx(number, rel=0.1, abs=3) for name, number in stated.items()} == counted
    (large,) = re.findall(r"at 100,000 losses\s+`KLBall` takes about (\d+) operations", page)
    assert operations(rgd.KLBall(0.1), 100_000) == pytest.approx(int(large), rel=0.1)


def test_every_make_target_they_name_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    named = {
        page: set(re.findall(r"\bmake ([a-z-]+)\b(?=`|\s+#|\s+&&| [A-Z]+=)", PAGES[page]))
        for page in ("README.md", "CONTRIBUTING.md", "speed.md")
    }
    assert {"demo", "test", "wheel"} <= named["README.md"] <= targets
    assert {"bench", "bench-compare", "bench-instructions"} <= named["speed.md"] <= targets
    listed = re.findall(r"^([a-z-]+):.*## ", makefile, re.MULTILINE)
    assert set(listed) <= named["CONTRIBUTING.md"] <= targets


def test_pip_is_given_a_path_and_never_the_name_of_another_project():
    commands = [command for text in PAGES.values() for command in re.findall(r"pip install ([^\n#]+)", text)]
    assert re.findall(r"pip install ", README)
    for command in commands:
        arguments = [word for word in shlex.split(command) if not word.startswith("-")]
        assert all("/" in word for word in arguments), command
