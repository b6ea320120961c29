"""Forks, workers and threads: the pool survives them all."""

import subprocess
import sys
import textwrap
import threading

import pytest
import torch
from rgd.torch import cross_entropy

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
