"""Make a release of the committed tree: write its version and date, commit, tag.

    python tools/release.py 0.2.0 [--dry-run]

`make release VERSION=0.2.0` runs it. Nothing is pushed. Run the tests first: this does not.
"""

from __future__ import annotations

import argparse
import datetime
import difflib
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VERSION = re.compile(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)")
CARGO = re.compile(r'(\[package\]\nname = "rgd"\nversion = ")([^"]+)(")')
LOCK = re.compile(r'(\[\[package\]\]\nname = "rgd"\nversion = ")([^"]+)(")')
CITED = re.compile(r'(^version: ")([^"]+)("\n(?:date-released: .*\n)?)', re.MULTILINE)
UNRELEASED = re.compile(r"^## Unreleased\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)


def git(root: Path, *arguments: str) -> str:
    """The output of git.

    Raises:
        subprocess.CalledProcessError: If git fails; its own words are on stderr.
    """
    return subprocess.run(["git", *arguments], cwd=root, check=True, stdout=subprocess.PIPE, text=True).stdout


def as_numbers(version: str) -> tuple[int, ...]:
    """A version as numbers, which compare as versions do."""
    return tuple(int(part) for part in version.split("."))


def problems(root: Path, version: str) -> list[str]:
    """The reasons why this version cannot be released from a checkout; empty if it can."""
    if not VERSION.fullmatch(version):
        return [f"VERSION must be three numbers, such as 0.2.0, got {version!r}: make release VERSION=0.2.0"]
    found: list[str] = []
    if git(root, "status", "--porcelain"):
        found.append("the working tree has changes: commit them, or put them aside")
    if git(root, "tag", "--list", f"v{version}"):
        found.append(f"the tag v{version} is there already: choose the next version")
    stated = {
        name: match[2] if (match := pattern.search((root / name).read_text(encoding="utf-8"))) else None
        for name, pattern in (("Cargo.toml", CARGO), ("Cargo.lock", LOCK), ("CITATION.cff", CITED))
    }
    missing = [name for name, one in stated.items() if one is None]
    if missing:
        found.append(f"no version of rgd was found in {', '.join(missing)}")
    elif len(set(stated.values())) > 1:
        told = ", ".join(f"{name} has {one}" for name, one in stated.items())
        found.append(f"the versions differ: {told}. Make them equal")
    elif as_numbers(version) < as_numbers(str(stated["Cargo.toml"])):
        found.append(f"{version} is older than the {stated['Cargo.toml']} of Cargo.toml: choose a newer one")
    project = (root / "pyproject.toml").read_text(encoding="utf-8")
    if 'dynamic = ["version"]' not in project or re.search(r"^version\s*=", project, re.MULTILINE):
        found.append(
            'pyproject.toml must take its version from Cargo.toml: write dynamic = ["version"] and no version'
        )
    changelog = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    section = UNRELEASED.search(changelog)
    if section is None or not section[1].strip():
        found.append('CHANGELOG.md has nothing under "## Unreleased": write what users will notice')
    if re.search(rf"^## {re.escape(version)}\b", changelog, re.MULTILINE):
        found.append(f"CHANGELOG.md has a section {version} already")
    return found


def released(root: Path, version: str, date: datetime.date) -> dict[str, str]:
    """The new text of each file that a release changes."""
    number = rf"\g<1>{version}\g<3>"
    heading = re.compile(r"^## Unreleased$", re.MULTILINE)
    changes = (
        ("Cargo.toml", CARGO, number),
        ("Cargo.lock", LOCK, number),
        ("CITATION.cff", CITED, rf'\g<1>{version}"\ndate-released: "{date.isoformat()}"\n'),
        ("CHANGELOG.md", heading, f"## {version} ({date.isoformat()})"),
    )
    return {
        name: pattern.sub(new, (root / name).read_text(encoding="utf-8"), count=1)
        for name, pattern, new in changes
    }


def difference(root: Path, texts: dict[str, str]) -> str:
    """The changes of the texts, as a patch."""
    lines: list[str] = []
    for name, text in texts.items():
        old = (root / name).read_text(encoding="utf-8")
        lines += difflib.unified_diff(
            old.splitlines(keepends=True), text.splitlines(keepends=True), f"a/{name}", f"b/{name}", n=0
        )
    return "".join(lines)


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Release, or say why not; the exit code."""
    parser = argparse.ArgumentParser(prog="tools/release.py", description=__doc__)
    parser.add_argument("version")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and change nothing")
    given = parser.parse_args(arguments)

    found = problems(root, given.version)
    if found:
        print("no release:", *found, sep="\n- ", file=sys.stderr)
        return 1
    texts = released(root, given.version, datetime.date.today())
    tag = f"v{given.version}"
    if given.dry_run:
        print(
            difference(root, texts),
            f"would commit this as 'Release {given.version}' and tag it {tag}",
            sep="\n",
        )
        return 0
    try:
        for name, text in texts.items():
            (root / name).write_text(text, encoding="utf-8")
        git(root, "commit", "--quiet", "-m", f"Release {given.version}", "--", *texts)
    except BaseException:
        git(root, "checkout", "--quiet", "HEAD", "--", *texts)
        raise
    git(root, "tag", "--annotate", tag, "-m", f"rgd {given.version}")
    print(f"committed and tagged {tag}. To publish it: git push origin HEAD {tag}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
