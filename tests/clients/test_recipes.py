"""Every recipe of docs/clients.md runs, where the clients it needs are installed."""

import contextlib
import importlib.util
import io
import os
import pathlib
import re
import warnings

import pytest
import torch

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "clients.md"
TEXT = PAGE.read_text(encoding="utf-8")
NEEDS = re.compile(r"# needs: (.+)")


def recipes():
    """Each fence with its section's title, the clients it needs and the line of the page it starts on."""
    for number, match in enumerate(re.finditer(r"^```py\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)):
        title = re.findall(r"^## (.*)$", TEXT[: match.start()], re.MULTILINE)[-1]
        line = TEXT[: match.start()].count("\n") + 1
        yield pytest.param(match[1], line, id=f"{number}: {title}")


def clients(code):
    return [name.strip() for name in NEEDS.match(code)[1].split(",")]


@pytest.mark.filterwarnings("ignore")  # what the clients and their dependencies warn of
@pytest.mark.parametrize(("code", "line"), list(recipes()))
def test_a_recipe_runs_on_its_own(code, line, tmp_path, monkeypatch):
    for client in clients(code):
        if importlib.util.find_spec(client) is None:
            pytest.skip(f"{client} is not installed")
    monkeypatch.chdir(tmp_path)
    if "keras" in clients(code):
        monkeypatch.setenv("KERAS_BACKEND", os.environ.get("KERAS_BACKEND", "torch"))
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # models this small gain nothing from more
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            exec(compile("\n" * line + code, str(PAGE), "exec"), {"__name__": "recipe"})
    finally:
        torch.set_num_threads(threads)


def test_every_recipe_says_what_it_needs_and_every_client_of_the_table_has_one():
    needed = {client for recipe in recipes() for client in clients(recipe.values[0])}
    assert {
        "transformers",
        "trl",
        "accelerate",
        "lightning",
        "skorch",
        "fastai",
        "timm",
        "monai",
        "keras",
        "ignite",
        "jax",
    } <= needed
