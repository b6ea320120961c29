"""Build the site: the pages of the repository, a reference of every public name, a page to try weights.

    python docs/site/build.py

`make docs` runs it. The site has the folders of the repository, so the links of the pages work in both.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from importlib import metadata
from pathlib import Path

from sphinx.cmd.build import build_main

SITE = Path(__file__).resolve().parent
ROOT = SITE.parents[1]
BUILT = ROOT / "target" / "site"
COPIED = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "docs/*.md",
    "docs/*.png",
    "examples/*.ipynb",
    "examples/*.py",
    "examples/evidence/*.md",
    "examples/evidence/*.py",
    "examples/evidence/harness/*.py",
    "examples/evidence/results/*",
    "examples/recipes/*",
)
"""The files of the repository that are pages of the site, or that its pages point at."""

CONTENTS = {
    "Use": ("docs/which", "try", "docs/weightings", "examples/quickstart", "examples/quickstart_jax"),
    "Guides": (
        "docs/torch",
        "docs/jax",
        "docs/numpy",
        "docs/groups",
        "docs/language_models",
        "docs/clients",
        "docs/boosting",
        "docs/gpu",
    ),
    "Behind it": ("docs/mathematics", "evidence", "docs/speed", "docs/backends", "docs/trust"),
    "Reference": ("reference/index",),
    "Develop": (
        "docs/architecture",
        "docs/add_a_weighting",
        "docs/add_a_backend",
        "CONTRIBUTING",
        "CHANGELOG",
    ),
}
"""The sections of the site and their pages."""


def toctree(pages: list[str] | tuple[str, ...], caption: str = "") -> str:
    """A list of pages that is shown only in the sidebar."""
    options = [":hidden:", *([f":caption: {caption}"] if caption else [])]
    return "\n".join(["```{toctree}", *options, "", *(f"/{page}" for page in pages), "```", ""])


def lay_out(source: Path) -> None:
    """Write the sources of the site into an empty folder."""
    for pattern in COPIED:
        for file in sorted(ROOT.glob(pattern)):
            if file.is_file():
                target = source / file.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
    trees = "\n".join(toctree(pages, caption) for caption, pages in CONTENTS.items())
    start = (ROOT / "README.md").read_text(encoding="utf-8")
    (source / "index.md").write_text(f"{start}\n{trees}", encoding="utf-8")
    shutil.copyfile(SITE / "try.md", source / "try.md")
    write_evidence(source)
    write_reference(source / "reference")


def write_evidence(source: Path) -> None:
    """The page that lists the pages of evidence: what the repository says about them, and a page a row."""
    rows = [page.stem for page in sorted((source / "examples/evidence/results").glob("*.md"))]
    tree = toctree(
        [
            "examples/evidence/README",
            *(f"examples/evidence/results/{row}" for row in rows),
            "examples/recipes/README",
        ]
    )
    links = "\n".join(f"- {{doc}}`/examples/evidence/results/{row}`" for row in rows)
    (source / "evidence.md").write_text(
        f"""# Evidence

One page for each question, written from the results that are committed beside its program.
{{doc}}`/docs/which` draws the conclusions.
{{doc}}`/examples/evidence/README` says how everything was measured.

{links}

{{doc}}`/examples/recipes/README` has programs for data sets that you have on disk.

{tree}""",
        encoding="utf-8",
    )


def write_reference(folder: Path) -> None:
    """A page for each public module, with every public name."""
    sys.path.insert(0, str(SITE))
    import links  # noqa: PLC0415

    folder.mkdir()
    lines = ["# Reference", "", "Every public name, a page for each module.", ""]
    for module, subject in links.MODULES.items():
        lines.append(f"- {{doc}}`{module} <{module}>`: {subject}")
        names = links.public_names(module)
        page = [module, "=" * len(module), "", f".. automodule:: {module}", "   :no-members:", ""]
        for name in names:
            kind = links.kind_of(module, name)
            page += [
                name,
                "-" * len(name),
                "",
                f".. auto{kind}:: {module}.{name}",
                *(["   :members:"] if kind == "class" else []),
                "",
            ]
        (folder / f"{module}.rst").write_text("\n".join(page), encoding="utf-8")
    tree = toctree([f"reference/{module}" for module in links.MODULES])
    (folder / "index.md").write_text("\n".join([*lines, "", tree]), encoding="utf-8")


def lay_out_static(static: Path) -> None:
    """Styles and programs of the site, and MathJax."""
    shutil.copytree(SITE / "static", static)
    (static / "mathjax").mkdir()
    name = "tex-svg-full.js"
    (found,) = [
        file
        for file in metadata.files("django-static-mathjax") or ()
        if file.name == name and file.parent.name == "es5"
    ]
    shutil.copyfile(str(found.locate()), static / "mathjax" / name)


def main() -> int:
    """Build the site; returns the exit code of Sphinx, which treats warnings as errors."""
    begin = time.perf_counter()
    shutil.rmtree(BUILT, ignore_errors=True)
    source, static = BUILT / "source", BUILT / "static"
    source.mkdir(parents=True)
    lay_out_static(static)
    lay_out(source)
    os.environ["RGD_SITE_STATIC"] = str(static)
    strict = ["--fail-on-warning", "--keep-going", "--quiet"]
    settings = ["-c", str(SITE), "-d", str(BUILT / "doctrees")]
    code = build_main([*strict, *settings, str(source), str(BUILT / "html")])
    (BUILT / "html" / "versions.json").write_text("[]", encoding="utf-8")  # publish.py knows of others
    print(f"{BUILT / 'html' / 'index.html'}: {time.perf_counter() - begin:.0f} s")
    return code


if __name__ == "__main__":
    sys.exit(main())
