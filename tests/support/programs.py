"""Scripts run as `python script.py arguments`, in a process that has imported their libraries already."""

import contextlib
import io
import runpy
import sys
from unittest import mock


def run_script(path, *arguments):
    """The output of the script. Errors are raised, and warnings too, as in all tests."""
    imported = set(sys.modules)
    printed = io.StringIO()
    with (
        mock.patch.object(sys, "argv", [str(path), *map(str, arguments)]),
        mock.patch.object(sys, "path", [str(path.parent), *sys.path]),
        contextlib.redirect_stdout(printed),
    ):
        runpy.run_path(str(path), run_name="__main__")
    # Modules beside the script must not be importable in later tests.
    for name in set(sys.modules) - imported:
        file = getattr(sys.modules[name], "__file__", None)
        if file is not None and file.startswith(str(path.parent)):
            del sys.modules[name]
    return printed.getvalue()
