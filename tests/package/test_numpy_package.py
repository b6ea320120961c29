"""The package: threads and forked processes, what importing it costs, and what it offers."""

import concurrent.futures
import importlib.metadata
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import rgd
from numpy_losses import assert_same_bits, weigh

# Threads and processes.


def test_calls_from_many_threads_do_not_disturb_each_other():
    rng = np.random.default_rng(0)
    cases = [
        (rng.exponential(size=size).astype(dtype), weighting)
        for size in (10, 3000, 100_000)
        for dtype in (np.float64, np.float32)
        for weighting in (rgd.KL(), rgd.KL(normalize=True), rgd.KLBall(0.1))
    ]
    expected = [(weigh(*case), rgd.reweighted_mean(*case)) for case in cases]

    def work(seed):
        for i in np.random.default_rng(seed).permutation(len(cases)):
            assert_same_bits(rgd.sample_weights(*cases[i]), expected[i][0])
            assert rgd.reweighted_mean(*cases[i]) == expected[i][1]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            for done in [pool.submit(work, seed) for seed in range(24)]:
                done.result(timeout=60)
    finally:
        sys.setswitchinterval(interval)


def run_python(code, *arguments, timeout=60):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="this system has no fork")
def test_a_forked_child_computes_after_its_parent_has_used_the_pool():
    # In a process of its own, so that no other library's threads are there to be forked.
    run_python(
        """
        import multiprocessing, warnings
        import numpy as np
        from rgd import KL, KLBall, _rgd
        from rgd.weightings._call import kernel_of

        losses = np.random.default_rng(0).exponential(size=1 << 20)

        def weigh(weighting):
            weights = np.empty_like(losses)
            _rgd.sample_weights(losses, weights, *kernel_of(weighting), 2)
            return weights

        expected = {weighting: weigh(weighting) for weighting in (KL(), KLBall(0.1))}

        def grandchild():
            for weighting, weights in expected.items():
                assert (weigh(weighting) == weights).all()

        def run(target):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                process = multiprocessing.get_context("fork").Process(target=target)
                process.start()
            process.join(20)
            alive = process.is_alive()
            if alive:
                process.kill()
            assert not alive and process.exitcode == 0, process.exitcode

        def child():
            grandchild()
            run(grandchild)

        run(child)
        run(child)
        grandchild()
        """
    )


# The package.


def test_importing_rgd_imports_no_framework():
    loaded = run_python("import sys, rgd; print(*{name.partition('.')[0] for name in sys.modules})").split()
    assert not {"torch", "jax", "jaxlib", "optax", "scipy", "ml_dtypes"} & set(loaded)


def test_importing_rgd_adds_less_than_100_ms_to_numpy():
    code = """
        import time
        import numpy
        start = time.process_time()
        import rgd
        print(time.process_time() - start)
    """
    # The time of the processor, which other processes on the machine do not lengthen.
    assert min(float(run_python(code)) for _ in range(3)) < 0.1


def test_the_version_is_that_of_the_distribution():
    try:
        expected = importlib.metadata.version("rgd")
    except importlib.metadata.PackageNotFoundError:
        expected = "0+unknown"
    assert rgd.__version__ == expected


def test_what_the_package_offers_is_listed():
    for name in rgd.__all__:
        assert getattr(rgd, name).__doc__ or name == "Weighting"
