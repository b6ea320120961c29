"""Refuses, when it is imported, an interpreter other than the process's first one.

NumPy and the kernels keep state that belongs to the process. In a subinterpreter some versions of NumPy
raise, each in words of its own, some warn, and what then works is chance.
"""

from __future__ import annotations

import importlib
from typing import Any


def refuse_subinterpreter() -> None:
    """Raise in a subinterpreter.

    Raises:
        ImportError: If this is not the main interpreter.
    """
    # CPython's own module: of this name since 3.13, of the other one before; elsewhere there is none.
    for name in ("_interpreters", "_xxsubinterpreters"):
        try:
            interpreters: Any = importlib.import_module(name)
        except ImportError:
            continue
        if interpreters.get_current() != interpreters.get_main():
            raise ImportError(
                "rgd cannot be imported in a subinterpreter, for NumPy and its kernels keep state of the "
                "whole process: use threads, with which the kernels run in parallel, or processes, as those "
                "of concurrent.futures.ProcessPoolExecutor; under mod_wsgi set WSGIApplicationGroup %{GLOBAL}"
            )
        return


refuse_subinterpreter()
