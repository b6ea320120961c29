"""Forks, workers and threads: the pool survives them all."""

import multiprocessing
import sys
import threading

import pytest
import torch
from rgd.torch import cross_entropy
from torch.utils.data import DataLoader, Dataset

LOGITS = torch.randn(400, 500, generator=torch.Generator().manual_seed(0))
TARGET = torch.arange(400) % 500


def value() -> float:
    return cross_entropy(LOGITS, TARGET).item()


def child(queue):
    torch.set_num_threads(2)
    queue.put(value())


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_computes_with_a_pool_of_its_own():
    expected = value()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=child, args=(queue,)) for _ in range(3)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert results == [expected] * 3
    assert value() == expected


class Losses(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, i):
        torch.set_num_threads(2)
        return cross_entropy(LOGITS[i:], TARGET[i:])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_data_loader_workers_compute_too():
    value()
    expected = torch.stack([cross_entropy(LOGITS[i:], TARGET[i:]) for i in range(8)])
    loader = DataLoader(Losses(), batch_size=4, num_workers=2, timeout=60)
    assert torch.equal(torch.cat(list(loader)), expected)


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
