"""Processes for gloo groups in the tests: they stay alive, and each job forms a group of some of them."""

import multiprocessing
import queue
import time
import traceback

import pytest
import torch
import torch.distributed as dist

TIMEOUT = 60


def work(inbox, outbox):
    torch.set_num_threads(1)
    while (job := inbox.get()) is not None:
        function, rank, size, store, arguments = job
        try:
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
            try:
                outcome = function(rank, size, *arguments)
            finally:
                # Older torch may hang if a group is destroyed while its thread frees its last tensor.
                time.sleep(0.05)
                dist.destroy_process_group()
            outbox.put((rank, outcome, None))
        except Exception:
            outbox.put((rank, None, traceback.format_exc()))


class Workers:
    def __init__(self):
        # Workers are forked from a process that has imported torch and has not used it.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["rgd.torch", "torch.distributed.fsdp", "torch._dynamo"])
        self.outbox = context.Queue()
        self.inboxes = [context.Queue() for _ in range(3)]
        self.processes = [
            context.Process(target=work, args=(inbox, self.outbox), daemon=True) for inbox in self.inboxes
        ]
        for process in self.processes:
            process.start()

    def run(self, size, store, function, *arguments):
        """What `function(rank, size, *arguments)` returns on each rank."""
        for rank in range(size):
            self.inboxes[rank].put((function, rank, size, store, arguments))
        outcomes = {}
        for _ in range(size):
            try:
                rank, outcome, error = self.outbox.get(timeout=TIMEOUT)
            except queue.Empty:
                self.stop()
                pytest.fail(f"no answer in {TIMEOUT} s, after {sorted(outcomes)} of {size} ranks: they hang")
            if error is not None:
                self.stop()  # the other ranks may still wait for this one
                pytest.fail(f"rank {rank}:\n{error}")
            outcomes[rank] = outcome
        return [outcomes[rank] for rank in range(size)]

    def stop(self):
        for process in self.processes:
            process.kill()
            process.join()
