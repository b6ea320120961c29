"""`make release` on a copy of the files: what it refuses and what it writes; a dry run writes nothing."""

import datetime
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("release", ROOT / "tools" / "release.py")
release = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(release)
PATTERNS = {"Cargo.toml": release.CARGO, "Cargo.lock": release.LOCK, "CITATION.cff": release.CITED}
FILES = [*PATTERNS, "CHANGELOG.md", "pyproject.toml"]

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


def git(root, *arguments):
    done = subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A repository with the files that a release reads, at version 0.1.0, with one line in the changelog."""
    for key in [key for key in os.environ if key.startswith("GIT_")]:
        monkeypatch.delenv(key)
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{role}_NAME", "A")
        monkeypatch.setenv(f"GIT_{role}_EMAIL", "a@example.org")
    (tmp_path / "tools").mkdir()
    for name in (*FILES, "Makefile", "tools/release.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    changelog = "# Changelog\n\n## Unreleased\n\n- Something new.\n\n## 0.1.0\n\nFirst version.\n"
    (tmp_path / "CHANGELOG.md").write_text(changelog)
    set_version(tmp_path, "0.1.0")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "config", "commit.gpgsign", "false")
    git(tmp_path, "config", "tag.gpgsign", "false")
    commit(tmp_path)
    return tmp_path


def set_version(root, version, names=tuple(PATTERNS)):
    for name in names:
        text = (root / name).read_text()
        (root / name).write_text(PATTERNS[name].sub(rf"\g<1>{version}\g<3>", text))


def commit(root):
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "-m", "Before")


def test_it_writes_version_and_date_commits_and_tags(copy, capsys):
    assert release.main(["0.2.0"], copy) == 0
    today = datetime.date.today().isoformat()
    assert f"## 0.2.0 ({today})\n\n- Something new." in (copy / "CHANGELOG.md").read_text()
    assert '[package]\nname = "rgd"\nversion = "0.2.0"' in (copy / "Cargo.toml").read_text()
    assert 'name = "rgd"\nversion = "0.2.0"' in (copy / "Cargo.lock").read_text()
    assert f'version: "0.2.0"\ndate-released: "{today}"\n' in (copy / "CITATION.cff").read_text()
    assert git(copy, "status", "--porcelain") == ""
    assert git(copy, "log", "-1", "--format=%s") == "Release 0.2.0"
    assert len(git(copy, "diff", "--numstat", "HEAD~1").splitlines()) == 4
    assert git(copy, "rev-parse", "v0.2.0^{commit}") == git(copy, "rev-parse", "HEAD")
    assert git(copy, "cat-file", "-t", "v0.2.0") == "tag"
    assert "git push origin HEAD v0.2.0" in capsys.readouterr().out


def test_a_second_release_replaces_the_date(copy):
    assert release.main(["0.2.0"], copy) == 0
    changelog = copy / "CHANGELOG.md"
    changelog.write_text(
        changelog.read_text().replace("Changelog\n", "Changelog\n\n## Unreleased\n\n- More.\n", 1)
    )
    commit(copy)
    assert release.main(["0.3.0"], copy) == 0
    assert (copy / "CITATION.cff").read_text().count("date-released") == 1
    assert changelog.read_text().index("## 0.3.0 (") < changelog.read_text().index("## 0.2.0 (")


def test_the_version_that_the_files_have_already_can_be_released(copy):
    set_version(copy, "0.2.0")
    commit(copy)
    assert release.main(["0.2.0"], copy) == 0
    assert git(copy, "tag") == "v0.2.0"


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_a_dry_run_changes_nothing_and_tells_what_would_change(copy):
    before = {name: (copy / name).read_bytes() for name in FILES}, git(copy, "rev-parse", "HEAD")
    command = ["make", "release", "VERSION=0.2.0", "DRY=1"]
    done = subprocess.run(command, cwd=copy, check=True, capture_output=True, text=True)
    assert '+version = "0.2.0"' in done.stdout
    assert "+## 0.2.0 (" in done.stdout
    assert "tag it v0.2.0" in done.stdout
    assert ({name: (copy / name).read_bytes() for name in FILES}, git(copy, "rev-parse", "HEAD")) == before
    assert git(copy, "tag") == git(copy, "status", "--porcelain") == ""


def replaced(name, old, new):
    def change(root):
        text = (root / name).read_text()
        assert old in text
        (root / name).write_text(text.replace(old, new, 1))
        commit(root)

    return change


def nothing(root):
    pass


def with_a_new_file(root):
    (root / "new.py").write_text("")


def with_a_tag(root):
    git(root, "tag", "v0.2.0")


def with_another_version_in_cargo(root):
    set_version(root, "0.1.5", ["Cargo.toml"])
    commit(root)


SECTION = "## Unreleased\n\n- Something new.\n\n"
REFUSED = {
    "no version": ("", nothing, "VERSION must be three numbers"),
    "a word": ("next", nothing, "got 'next'"),
    "a leading v": ("v0.2.0", nothing, "VERSION must be three numbers"),
    "an older version": ("0.0.9", nothing, "0.0.9 is older than the 0.1.0"),
    "a new file": ("0.2.0", with_a_new_file, "the working tree has changes"),
    "a tag": ("0.2.0", with_a_tag, "the tag v0.2.0 is there"),
    "versions that differ": (
        "0.2.0",
        with_another_version_in_cargo,
        "Cargo.toml has 0.1.5, Cargo.lock has 0.1.0",
    ),
    "a version in pyproject": (
        "0.2.0",
        replaced("pyproject.toml", 'dynamic = ["version"]', 'version = "0.1.0"'),
        "pyproject.toml must take its version from Cargo.toml",
    ),
    "no new section": ("0.2.0", replaced("CHANGELOG.md", SECTION, ""), "nothing under"),
    "an empty section": ("0.2.0", replaced("CHANGELOG.md", "- Something new.\n", ""), "nothing under"),
    "a section of it": ("0.2.0", replaced("CHANGELOG.md", "## 0.1.0", "## 0.2.0"), "a section 0.2.0 already"),
}


@pytest.mark.parametrize(("version", "prepare", "said"), REFUSED.values(), ids=REFUSED)
def test_it_refuses_and_leaves_all_as_it_was(copy, capsys, version, prepare, said):
    prepare(copy)
    before = git(copy, "rev-parse", "HEAD"), git(copy, "tag"), git(copy, "status", "--porcelain")
    assert release.main([version], copy) == 1
    assert said in capsys.readouterr().err
    assert (git(copy, "rev-parse", "HEAD"), git(copy, "tag"), git(copy, "status", "--porcelain")) == before


def test_a_commit_that_a_hook_refuses_leaves_the_files_as_they_were(copy):
    hook = copy / ".git" / "hooks" / "pre-commit"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text("#!/bin/sh\nexit 1\n")
    hook.chmod(0o755)
    with pytest.raises(subprocess.CalledProcessError):
        release.main(["0.2.0"], copy)
    assert git(copy, "status", "--porcelain") == git(copy, "tag") == ""


def test_the_versions_of_this_checkout_agree():
    found = {name: pattern.search((ROOT / name).read_text())[2] for name, pattern in PATTERNS.items()}
    assert len(set(found.values())) == 1, found
