"""Look through what is published: the files of an sdist, the files and the compiled extension of wheels.

    python tests/package/check_built.py dist/rgd-*.tar.gz dist/rgd-*.whl

Not a test module of pytest: `make wheels` and the workflow of the wheels run it.
"""

from __future__ import annotations

import os
import pathlib
import re
import sys
import tarfile
import zipfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Homes of people and of build machines, in any wheel. `/rustc/` and `/rust/deps/` come with the toolchain.
HOMES = re.compile(rb"(?:/home/|/root/|/Users/|/github/|[A-Z]:\\(?:Users|a)\\)[\w.\\/+-]{3,}")
KEPT_OUT = (".github", ".ci", "benches", "docs", "examples", "tests", "tools", "conftest.py")


def paths_of_the_machine(code: bytes, places: list[str]) -> set[str]:
    """The paths in compiled code that name a home, or one of some places on this machine."""
    found = {match.decode() for match in HOMES.findall(code)}
    return found | {place for place in places if place.encode() in code}


def problems_of_wheel(wheel: pathlib.Path, places: list[str]) -> list[str]:
    """What is wrong with a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (folder,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
        sources = {
            file.relative_to(ROOT / "python").as_posix()
            for file in (ROOT / "python").rglob("*")
            if file.suffix in (".py", ".pyi", ".typed")
        }
        problems = [f"{name} is missing" for name in sorted(sources - names)]
        if not [name for name in names if name.startswith(f"{folder}/sboms/")]:
            problems.append("there is no list of the crates it is built from (SBOM)")
        extensions = [name for name in names if re.fullmatch(r"rgd/_rgd[\w.-]*\.(so|pyd)", name)]
        if len(extensions) != 1:
            problems.append(f"there must be one extension, not {extensions}")
        others = names - sources - set(extensions)
        problems += [f"{name} does not belong there" for name in others if not name.startswith(f"{folder}/")]
        for name in extensions:
            paths = sorted(paths_of_the_machine(archive.read(name), places))
            if paths:
                problems.append(f"{name} holds {len(paths)} paths of the machine, {paths[0]} among them")
        metadata = archive.read(f"{folder}/METADATA").decode()
    return problems + [
        f"the metadata has no {line!r}"
        for line in ("Classifier: Typing :: Typed", "Requires-Python: >=3.10", "License-File: LICENSE")
        if line not in metadata
    ]


def problems_of_sdist(sdist: pathlib.Path) -> list[str]:
    """What is wrong with an sdist."""
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {
        file.relative_to(ROOT).as_posix()
        for folder, suffixes in (("src", (".rs",)), ("python", (".py", ".pyi", ".typed")))
        for file in (ROOT / folder).rglob("*")
        if file.suffix in suffixes
    }
    sources |= {"Cargo.toml", "Cargo.lock", "LICENSE", "README.md", "pyproject.toml", "PKG-INFO"}
    problems = [f"{name} is missing" for name in sorted(sources - names)]
    return problems + [
        f"{name} does not belong there"
        for name in sorted(names)
        if name.split("/")[0] in KEPT_OUT or name.endswith((".so", ".pyd", ".dll", ".dylib"))
    ]


def main(files: list[pathlib.Path]) -> int:
    """Print what is wrong with the files; the exit code."""
    home = pathlib.Path.home()
    places = [str(ROOT), os.environ.get("CARGO_HOME", str(home / ".cargo"))]
    failed = False
    for file in files:
        problems = problems_of_wheel(file, places) if file.suffix == ".whl" else problems_of_sdist(file)
        failed |= bool(problems)
        print(f"{file.name} ({file.stat().st_size / 1e6:.1f} MB): {'; '.join(problems) or 'ok'}")
    return int(failed)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python tests/package/check_built.py FILE ...")
    sys.exit(main([pathlib.Path(argument) for argument in sys.argv[1:]]))
