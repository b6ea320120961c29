"""Forks, workers and threads: the pool survives them all."""

import concurrent.futures
import subprocess
import sys
import textwrap
import threading

import pytest
import rgd
import torch
from rgd.torch import RGDLoss, backend, cross_entropy

of_openmp = pytest.mark.skipif(
    sys.platform != "linux" or not torch.backends.openmp.is_available(),
    reason="torch's threads are not those of an OpenMP library that is looked for",
)
LOGITS = torch.randn(400, 500, generator=torch.Generator().manual_seed(0))
TARGET = torch.arange(400) % 500


def value() -> float:
    return cross_entropy(LOGITS, TARGET).item()


def run_alone(program):
    """Run a program in a process of its own: a fork of this one inherits what other tests imported."""
    prelude = textwrap.dedent("""
        import torch
        from rgd.torch import cross_entropy
        logits = torch.randn(400, 500)
        target = torch.arange(400) % 500
        torch.set_num_threads(2)
        expected = cross_entropy(logits, target)
    """)
    done = subprocess.run(
        [sys.executable, "-c", prelude + textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "same"


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
def test_forked_children_compute_with_a_pool_of_their_own():
    run_alone("""
        import os
        children = []
        for _ in range(3):
            child = os.fork()
            if child == 0:
                torch.set_num_threads(2)
                os._exit(0 if torch.equal(cross_entropy(logits, target), expected) else 1)
            children.append(child)
        codes = [os.waitpid(child, 0)[1] for child in children]
        same = torch.equal(cross_entropy(logits, target), expected)
        print("same" if same and codes == [0, 0, 0] else codes)
    """)


@of_openmp
def test_the_kernels_run_on_the_threads_of_torch_and_in_a_forked_child_on_their_own():
    run_alone("""
        import os
        from pathlib import Path
        from rgd import _rgd
        from rgd.torch import RGDLoss

        def names():
            return {entry.read_text().strip() for entry in Path("/proc/self/task").glob("*/comm")}

        criterion, wide = RGDLoss(), torch.randn(1024, 1000, requires_grad=True)
        logits, target = logits.repeat(4, 1), target.repeat(4)
        for _ in range(3):  # the whole way, then the short one
            criterion(wide, torch.arange(1024) % 1000).backward()
        assert not any(name.startswith("rgd-") for name in names()), names()
        assert _rgd.shares_threads()
        child = os.fork()
        if child == 0:
            cross_entropy(logits, target)
            ours = any(name.startswith("rgd-") for name in names())
            os._exit(0 if ours and not _rgd.shares_threads() else 1)
        print("same" if os.waitpid(child, 0)[1] == 0 else "the child has no threads of its own")
    """)


@of_openmp
def test_a_call_takes_as_many_threads_as_torch_then_has():
    run_alone("""
        from rgd.torch import RGDLoss
        criterion, outcomes = RGDLoss(reduction="none"), []
        for threads in (2, 1, 4, 3):
            torch.set_num_threads(threads)
            given = logits.clone().requires_grad_()
            losses = criterion(given, target)
            losses.sum().backward()
            outcomes.append((losses.detach(), given.grad))
        print("same" if all(map(torch.equal, sum(outcomes, ()), outcomes[0] * 4)) else outcomes)
    """)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
def test_data_loader_workers_compute_too():
    run_alone("""
        class Losses(torch.utils.data.Dataset):
            def __len__(self):
                return 8

            def __getitem__(self, i):
                torch.set_num_threads(2)
                return cross_entropy(logits[i:], target[i:])

        loader = torch.utils.data.DataLoader(Losses(), batch_size=4, num_workers=2, timeout=60)
        results = torch.cat(list(loader))
        here = torch.stack([cross_entropy(logits[i:], target[i:]) for i in range(8)])
        print("same" if torch.equal(results, here) else results)
    """)


def test_many_python_threads_get_the_right_result():
    expected = value()
    wrong = []
    interval = sys.getswitchinterval()

    def work():
        wrong.extend(v for v in (value() for _ in range(20)) if v != expected)

    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
            assert not thread.is_alive()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong


@pytest.fixture
def switching_often():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def in_threads(function, calls=50, threads=8):
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(lambda: [function() for _ in range(calls)]) for _ in range(threads)]:
            done.result()
    return calls * threads


@pytest.mark.usefixtures("switching_often")
def test_totals_and_state_of_a_shared_module_count_every_call_of_every_thread():
    criterion = RGDLoss(weighting=rgd.MovingAverage(rgd.KL(), decay=0.9), warn=True)
    criterion.reset_stats()
    # Losses on both sides of tau, so that nothing is warned of.
    logits, target = torch.linspace(-1, 1, 15).reshape(5, 3), torch.arange(5) % 3
    calls = in_threads(lambda: criterion(logits, target))
    assert criterion.stats(total=True).count == 5 * calls
    assert int(criterion.weighting_state.updates) == calls
    assert criterion._advisor.calls == calls


@pytest.mark.usefixtures("switching_often")
def test_blocks_of_backends_that_overlap_leave_the_default_choice_behind():
    def block():
        with backend("composite"):
            cross_entropy(LOGITS[:2], TARGET[:2])

    in_threads(block, calls=20)
    first, second = backend("composite"), backend("rust")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    with backend() as ran:
        value()
    second.__exit__(None, None, None)
    with backend() as after:
        value()
        torch.vmap(cross_entropy)(LOGITS[:2].view(2, 1, -1), TARGET[:2].view(2, 1))
    assert (ran, after) == (["rust"], ["rust", "composite"])


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
def test_a_child_forked_while_another_thread_holds_the_lock_of_the_states_can_use_them():
    run_alone("""
        import os, threading, rgd
        from rgd.torch import RGDLoss, _state
        criterion = RGDLoss(weighting=rgd.MovingAverage(rgd.KL(), 0.9))
        held, free = threading.Event(), threading.Event()
        def hold():
            with _state.one_at_a_time():
                held.set()
                free.wait()
        thread = threading.Thread(target=hold)
        thread.start()
        held.wait()
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            criterion(logits, target)
            os._exit(0)
        code = os.waitpid(child, 0)[1]
        free.set()
        thread.join()
        print("same" if code == 0 else code)
    """)
