"""A Sphinx extension for the pages and docstrings of the package.

Names of the package that a page has in backticks become links to the reference. Blocks of code in docstrings,
which are written for `help()`, become blocks of code on the page. Mermaid's diagrams are left out.
"""

import importlib.util
import inspect
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.ext.autodoc.mock import mock
from sphinx.transforms import SphinxTransform

MODULES = {
    "rgd": "the weightings, and NumPy",
    "rgd.torch": "PyTorch",
    "rgd.jax": "JAX",
    "rgd.optax": "optax",
    "rgd.boosting": "LightGBM, XGBoost and CatBoost",
    "rgd.sklearn": "scikit-learn",
    "rgd.integrations.transformers": "Hugging Face Trainer",
    "rgd.integrations.trl": "TRL",
    "rgd.integrations.lightning": "Lightning",
    "rgd.integrations.domainbed": "DomainBed and SubpopBench",
    "rgd.plot": "pictures",
    "rgd.testing": "a test of your own weighting",
    "rgd.torch.backends": "backends of your own",
    "rgd.reference": "the equations, in float64 NumPy",
}
"""The public modules, each a page of the reference."""

SECTION = re.compile(r"(Args|Returns|Raises|Attributes|Example|Examples|References|Yields|Note):")
CODE = re.compile(r"(?:rgd\.)?[A-Za-z_][\w.]*(?=$|\()")


DIAGRAM = re.compile(r"^```mermaid\n.*?^```\n", re.MULTILINE | re.DOTALL)
"""A diagram that only a script from elsewhere would draw; its page says the same in words."""

MISSING = [name for name in ("trl",) if importlib.util.find_spec(name) is None]
"""Libraries of integrations, which Sphinx stands in for where they are not installed."""


def imported(module: str) -> ModuleType:
    """A public module."""
    with mock(MISSING):
        return importlib.import_module(module)


def public_names(module: str) -> list[str]:
    """The public names of a module, without modules."""
    found = imported(module)
    defined = [
        name
        for name, value in vars(found).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module and callable(value)
    ]
    names = [
        name for name in getattr(found, "__all__", defined) if not inspect.ismodule(getattr(found, name))
    ]
    # `backend` of the backends is that of rgd.torch.
    above = module.rpartition(".")[0]
    taken = vars(imported(above)) if above in MODULES else {}
    return [name for name in names if taken.get(name) is not getattr(found, name)]


def kind_of(module: str, name: str) -> str:
    """Sphinx's word for the kind of a name: class, function or data."""
    found = getattr(imported(module), name)
    if inspect.isclass(found):
        return "exception" if issubclass(found, BaseException) else "class"
    return "function" if callable(found) else "data"


def targets() -> dict[str, str]:
    """The spellings that a page may use, with the name in the reference, without ambiguous short names."""
    found: dict[str, str] = {}
    short: dict[str, list[str]] = {}
    for module in MODULES:
        for name in public_names(module):
            found[f"{module}.{name}"] = f"{module}.{name}"
            short.setdefault(name, []).append(f"{module}.{name}")
    # `RGDLoss` is clear; `softmax`, or a lower-case word that is a column of a table too, is not.
    found.update({name: full[0] for name, full in short.items() if len(full) == 1 and not name.islower()})
    return found


class LinkNames(SphinxTransform):
    """Turns `rgd.KL(0.5)` and `RGDLoss`, where a page has them as code, into links."""

    default_priority = 400

    def apply(self, **_: Any) -> None:
        """Wrap the literals of a page; those inside links and headings stay as they are."""
        if self.env.docname.startswith("reference/"):
            return
        for link in self.document.findall(addnodes.pending_xref):
            # `[torch.md](torch.md)` shows the file's name in the repository. The site shows the page's title.
            if link.get("refdomain") == "doc" and re.fullmatch(r"[\w/]+\.md", link.astext()):
                link["refexplicit"] = False
        names = self.env.rgd_names
        for literal in list(self._literals()):
            text = literal.astext()
            match = CODE.match(text)
            target = names.get(match[0]) if match else None
            if target is None:
                continue
            reference = addnodes.pending_xref(
                "",
                literal.deepcopy(),
                refdomain="py",
                reftype="obj",
                reftarget=target,
                refexplicit=True,
                refdoc=self.env.docname,
            )
            literal.parent.replace(literal, reference)

    def _literals(self) -> Iterator[nodes.literal]:
        for literal in self.document.findall(nodes.literal):
            above = literal.parent
            while above is not None and not isinstance(
                above, (nodes.title, nodes.reference, addnodes.pending_xref, addnodes.download_reference)
            ):
                above = above.parent
            if above is None:
                yield literal


def is_code(line: str) -> bool:
    """Whether a line of a docstring's description is indented."""
    return line.startswith("    ")


def show_code(*given: Any) -> None:
    """Mark the blocks of code before the first section of a docstring: in fences, or indented."""
    lines: list[str] = given[-1]
    result: list[str] = []
    in_code = in_fence = False
    for i, line in enumerate(lines):
        if SECTION.fullmatch(line):
            result += lines[i:]
            break
        if line.startswith("```"):
            in_fence = not in_fence
            result += [f".. code-block:: {line[3:]}", ""] if in_fence else [""]
            continue
        if in_fence:
            result.append(f"   {line}" if line else "")
            continue
        if is_code(line) and not in_code and i and not lines[i - 1]:
            result += ["::", ""]
        in_code = is_code(line) or (in_code and not line)
        result.append(line)
    lines[:] = result


def skip_generated(app: Sphinx, what: str, name: str, *_: Any) -> bool | None:
    """Leave out the methods that scikit-learn writes into every estimator."""
    return True if re.fullmatch(r"set_\w+_request", name) else None


def start(app: Sphinx) -> None:
    """Look the names up once."""
    app.env.rgd_names = targets()


def leave_out_diagrams(app: Sphinx, name: str, source: list[str]) -> None:
    """Leave the diagrams of a page out."""
    source[0] = DIAGRAM.sub("", source[0])


def setup(app: Sphinx) -> dict[str, Any]:
    """The entry point that Sphinx calls."""
    app.connect("builder-inited", start)
    app.connect("source-read", leave_out_diagrams)
    app.connect("autodoc-process-docstring", show_code, priority=400)  # before the sections are read
    app.connect("autodoc-skip-member", skip_generated)
    app.add_transform(LinkNames)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
