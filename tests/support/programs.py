"""Scripts run as `python script.py arguments`, in a process that has imported their libraries already."""

import contextlib
import io
import runpy
import sys
from unittest import mock


def run_script(path, *arguments):
    """What the script prints. An error is raised, and so is a warning, as anywhere in the tests."""
    imported = set(sys.modules)
    printed = io.StringIO()
    with (
        mock.patch.object(sys, "argv", [str(path), *map(str, arguments)]),
        mock.patch.object(sys, "path", [str(path.parent), *sys.path]),
        contextlib.redirect_stdout(printed),
    ):
        runpy.run_path(str(path), run_name="__main__")
    # What lies beside the script is not to be found by the tests that follow.
    for name in set(sys.modules) - imported:
        file = getattr(sys.modules[name], "__file__", None)
        if file is not None and file.startswith(str(path.parent)):
            del sys.modules[name]
    return printed.getvalue()
