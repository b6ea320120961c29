"""The sites of several versions stand side by side."""

import importlib
import json
import re
from pathlib import Path

import pytest

pytest.importorskip("packaging")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def publish(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs" / "site")
    return importlib.import_module("publish").publish


@pytest.fixture
def built(tmp_path):
    """A built site of one page."""
    folder = tmp_path / "built"
    folder.mkdir()
    (folder / "versions.json").write_text("[]")
    (folder / "index.html").write_text("the first build")
    return folder


def test_every_version_has_its_folder_and_knows_all_others_the_newest_release_first(publish, built, tmp_path):
    pages = tmp_path / "pages"
    for version in ("0.9.0", "main", "0.10.0", "0.10.0rc1"):
        publish(built, pages, version)
    names = ["0.10.0", "0.10.0rc1", "0.9.0", "main"]
    for name in names:
        assert (pages / name / "index.html").read_text() == "the first build"
        assert json.loads((pages / name / "versions.json").read_text()) == names
    assert re.search(r"url=([^/]+)/", (pages / "index.html").read_text())[1] == "0.10.0"
    assert (pages / ".nojekyll").is_file()


def test_a_version_published_again_is_replaced_and_no_other(publish, built, tmp_path):
    pages = tmp_path / "pages"
    publish(built, pages, "main")
    publish(built, pages, "0.9.0")
    (pages / "main" / "gone.html").touch()
    (built / "index.html").write_text("the second build")
    publish(built, pages, "main")
    assert (pages / "main" / "index.html").read_text() == "the second build"
    assert (pages / "0.9.0" / "index.html").read_text() == "the first build"
    assert not (pages / "main" / "gone.html").exists()


@pytest.mark.parametrize("name", ["", "..", "a/b", ".git"])
def test_a_name_that_is_no_folder_is_refused_before_anything_is_written(publish, built, tmp_path, name):
    with pytest.raises(ValueError, match="the name of a folder"):
        publish(built, tmp_path / "pages", name)
    assert not (tmp_path / "pages").exists()


def test_a_folder_that_is_no_built_site_is_refused(publish, tmp_path):
    with pytest.raises(FileNotFoundError, match="make docs"):
        publish(tmp_path, tmp_path / "pages", "main")
    assert not (tmp_path / "pages").exists()
