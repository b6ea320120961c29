"""What the programs in benches/ share: tables between markers, and the interpreter's steps."""

import importlib
import json
import pathlib
import sys

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


def between_markers(page: str, name: str) -> str:
    text = (BENCHES.parent / page).read_text()
    begin, end = f"<!-- bench {name}: begin -->\n", f"\n<!-- bench {name}: end -->"
    return text[text.index(begin) + len(begin) : text.index(end)]


def results(name: str) -> dict:
    return json.loads((BENCHES / "results" / f"{name}.json").read_text())


def test_the_tables_of_weightings_and_of_calls_are_those_of_the_results(bench):
    weightings = bench("weightings")
    for name, head in weightings.HEADS.items():
        found = results(name)
        table = weightings.table(found["figures"], head, found["machine"])
        assert between_markers("docs/speed.md", name) == table


def test_the_goals_stand_beside_the_figures_of_the_results(bench, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["goals.py"])
    bench("goals").main()
    assert between_markers("docs/speed.md", "goals") == capsys.readouterr().out.strip()


def test_the_tables_of_a_step_in_torch_are_those_of_the_results(bench):
    step, found = bench("torch_step"), results("torch_step")
    full, front = (table(found["figures"], found["machine"]) for table in (step.full_table, step.front_table))
    assert between_markers("docs/speed.md", "torch_step") == full
    assert between_markers("README.md", "torch_step, three rows") == front
    assert len(front.splitlines()) - front.splitlines().index("") - 3 == 3


def test_the_interpreters_steps_are_the_same_in_every_call(bench):
    instructions = bench("instructions")
    call = instructions.calls()["sample_weights"]
    first, second = (instructions.count(call) for _ in range(2))
    assert first == second > 0
    budgets = json.loads((BENCHES / "instructions.json").read_text())
    assert all(set(budget) == set(instructions.calls()) for budget in budgets.values())
