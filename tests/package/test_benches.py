"""What the programs in benches/ share: tables between markers, and the interpreter's steps."""

import importlib
import json
import pathlib

import pytest

BENCHES = pathlib.Path(__file__).parents[2] / "benches"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHES))
    return importlib.import_module


def test_a_table_takes_its_place_between_the_markers(bench, monkeypatch, tmp_path):
    report = bench("_report")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- bench step: begin -->\nold\n<!-- bench step: end -->\nafter\n")
    report.publish("page.md", "step", "| new \\1 |\n", [{"size": [1, 2]}])
    assert page.read_text() == (
        "before\n<!-- bench step: begin -->\n| new \\1 |\n<!-- bench step: end -->\nafter\n"
    )
    results = json.loads((tmp_path / "results" / "step.json").read_text())
    assert results["figures"] == [{"size": [1, 2]}]
    assert results["machine"]["torch"]
    with pytest.raises(ValueError, match=r"page.md has no markers <!-- bench other: begin -->"):
        report.publish("page.md", "other", "", [])


@pytest.mark.parametrize(("page", "name"), [("README.md", "torch_step"), ("docs/which.md", "weightings")])
def test_the_pages_have_the_markers_and_the_figures_are_those_of_the_results(page, name):
    text = (BENCHES.parent / page).read_text()
    begin, end = f"<!-- bench {name}: begin -->\n", f"<!-- bench {name}: end -->"
    table = text[text.index(begin) : text.index(end)]
    for figure in json.loads((BENCHES / "results" / f"{name}.json").read_text())["figures"]:
        cell = f"{figure['median']:.2f} ({figure['low']:.2f}-{figure['high']:.2f})"
        assert cell in table, figure


def test_the_interpreters_steps_are_the_same_in_every_call(bench):
    instructions = bench("instructions")
    call = instructions.calls()["sample_weights"]
    first, second = (instructions.count(call) for _ in range(2))
    assert first == second > 0
    budgets = json.loads((BENCHES / "instructions.json").read_text())
    assert all(set(budget) == set(instructions.calls()) for budget in budgets.values())
