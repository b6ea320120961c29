"""Refuses, when it is imported, an interpreter other than the process's first one.

NumPy and the kernels keep state for the whole process. In a subinterpreter some versions of NumPy raise
various errors, and others only warn and then may or may not work.
"""

from __future__ import annotations

import importlib
from typing import Any


def refuse_subinterpreter() -> None:
    """Raise in a subinterpreter.

    Raises:
        ImportError: If this is not the main interpreter.
    """
    # This private module of CPython has this name since 3.13, and the other one before. Others have neither.
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
