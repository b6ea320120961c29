"""Settings that all tests share. Doctests of modules whose client is not installed are left out."""

import gc
import importlib.metadata
import importlib.util
import itertools
import os
import pathlib
import random
import sys

import pytest
from hypothesis import settings

NEEDS = {
    "python/rgd/integrations/trl.py": "trl",
    "python/rgd/integrations/transformers.py": "transformers",
    "python/rgd/integrations/lightning.py": "lightning",
    "python/rgd/sklearn.py": "sklearn",
}
pytest_plugins = ["durations"]
collect_ignore = [path for path, client in NEEDS.items() if importlib.util.find_spec(client) is None]

settings.register_profile("rgd", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("rgd")

# Workers, programs that tests start and the next run share JAX's compiled code, since compiling takes long.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parent / ".pytest_cache" / "jax")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Without XLA's newer fusion emitters, a first run compiles in half the time. Programs over several devices
# and the oldest versions still use them. XLA aborts on an unknown flag: only versions that know it get it.
if importlib.util.find_spec("jaxlib") is not None and (0, 7) < tuple(
    map(int, importlib.metadata.version("jaxlib").split(".")[:2])
) < (0, 11):
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Several processes share the cores. Tests of threads set their number themselves. This must come before
    # the import of torch, which reads it.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_finish():
    """Freeze the objects of imports: trainers collect garbage often, and would scan all of them."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()


def pytest_runtest_setup():
    """Seed the random numbers, so that a test draws the same ones alone, after others and in any worker."""
    random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].default_generator.manual_seed(0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    """Skip a test in which a backend that `RGD_BACKEND` chooses for all tests refuses a call, and says so."""
    try:
        return (yield)
    except RuntimeError as error:
        if os.environ.get("RGD_BACKEND") and "was asked for, but" in str(error):
            pytest.skip(str(error))
        raise


@pytest.fixture(scope="module", autouse=True)
def forget_what_was_compiled():
    """Drop compiled programs after each file: those of all files take gigabytes and make tests slow."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
    gc.collect()
    gc.freeze()


@pytest.fixture
def one_thread():
    """Torch with one thread: models this small gain nothing from more, and the programs set it themselves."""
    import torch  # noqa: PLC0415

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def workers():
    """Three processes that stay alive for all tests of this process."""
    from workers import Workers  # noqa: PLC0415 - starts torch

    workers = Workers()
    yield workers
    for inbox in workers.inboxes:
        inbox.put(None)
    for process in workers.processes:
        process.join(5)
    workers.stop()


@pytest.fixture
def run(workers, tmp_path):
    """Runs a function of a rank and a size in a new process group of some of the workers."""
    number = itertools.count()

    def run(size, function, *arguments):
        if not workers.processes[0].is_alive():
            workers.__init__()
        # Each group gets a new store. In a reused one, a rank may find the address of the last group.
        return workers.run(size, str(tmp_path / f"store-{next(number)}"), function, *arguments)

    return run
