"""The kernels run on torch's own threads.

torch's threads wait for work actively for a while after each operation. A pool of our own beside them gets no
core in this time. So the kernels ask the OpenMP library that torch uses for its threads.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import torch

from rgd import _rgd


def share_threads() -> None:
    """Let the kernels run on torch's threads, where they are those of an OpenMP library and can be found.

    On Linux they are: the wheels of torch have the library beside their own.
    """
    if sys.platform != "linux" or not torch.backends.openmp.is_available():
        return
    try:
        # The search goes on in the libraries that this one needs, so it ends in the one that torch uses.
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        address = ctypes.cast(library.GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return
    if address:
        _rgd.share_threads(address)
