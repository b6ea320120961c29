"""Settings that all tests share."""

import os

from hypothesis import settings

settings.register_profile("rgd", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("rgd")

if "PYTEST_XDIST_WORKER" in os.environ:
    # Several processes share the cores; tests that are about threads set their number themselves. This stands
    # before torch is imported, which reads it then.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
