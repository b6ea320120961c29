"""Put a built site beside those of other versions, so that a reader can change from one to another.

    python docs/site/publish.py target/site/html pages 0.2.0

The folder `pages` then has a folder for each version, and `index.html`, which leads to the newest release.
Each version has the list of all. The hosted job of a tag or of `main` runs it: .github/workflows/docs.yml.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from packaging.version import InvalidVersion, Version

LIST = "versions.json"


def order(name: str) -> tuple[bool, Version]:
    """Releases by their number; names that are no number, such as "main", come before all of them."""
    try:
        return True, Version(name)
    except InvalidVersion:
        return False, Version("0")


def publish(built: Path, pages: Path, version: str) -> list[str]:
    """Copy a built site, and tell every version of all.

    Args:
        built: The built site.
        pages: The folder of all versions; made if it is not there.
        version: The name of this one. A version of this name is replaced.

    Returns:
        The names of all versions, the newest release first.

    Raises:
        FileNotFoundError: If `built` is no built site.
        ValueError: If the name is no name of a folder.
    """
    if not (built / LIST).is_file():
        raise FileNotFoundError(f"{built} is no built site: run make docs")
    if not version or version.startswith(".") or "/" in version:
        raise ValueError(f"a version is the name of a folder, such as 0.2.0 or main, got {version!r}")
    pages.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(pages / version, ignore_errors=True)
    shutil.copytree(built, pages / version)
    versions = sorted((found.parent.name for found in pages.glob(f"*/{LIST}")), key=order, reverse=True)
    for name in versions:
        (pages / name / LIST).write_text(json.dumps(versions), encoding="utf-8")
    (pages / "index.html").write_text(
        f'<!doctype html><meta charset="utf-8"><title>rgd</title>'
        f'<meta http-equiv="refresh" content="0; url={versions[0]}/">'
        f'<a href="{versions[0]}/">rgd {versions[0]}</a>\n',
        encoding="utf-8",
    )
    (pages / ".nojekyll").touch()  # GitHub then keeps the folders whose names begin with "_"
    return versions


def main() -> None:
    """Publish what the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("built", type=Path, help="the built site")
    parser.add_argument("pages", type=Path, help="the folder of all versions")
    parser.add_argument("version", help="the name of this version")
    arguments = parser.parse_args()
    print("\n".join(publish(arguments.built, arguments.pages, arguments.version)))


if __name__ == "__main__":
    main()
