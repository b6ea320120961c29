"""Handwritten digits on several processes: DistributedDataParallel with RGD. Starts with torchrun.

    torchrun --standalone --nproc-per-node 2 examples/ddp_digits.py

Each process trains on its own part of every batch, and DDP averages the gradients. Pointwise weights need
nothing more. With `--normalize` the weights are divided by their mean over the whole batch, of all processes:
`RGDLoss` gathers the losses by itself, because `torch.distributed` is initialised.

With the same `--batch`, any number of processes that divides it ends with the same parameters, up to
rounding.
"""

from __future__ import annotations

import argparse

import rgd
import torch
import torch.distributed as dist
from rgd.torch import RGDLoss
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel

TEST_SIZE = 360


def data() -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return torch.tensor(images / 16, dtype=torch.float32)[order], torch.tensor(labels)[order]


def train(epochs: int, batch: int, weighting: rgd.KL) -> tuple[nn.Module, RGDLoss]:
    rank, size = dist.get_rank(), dist.get_world_size()
    images, labels = (tensor[TEST_SIZE:] for tensor in data())
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)))
    criterion = RGDLoss(weighting=weighting)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    shuffle = torch.Generator().manual_seed(1)  # the same in every process
    for epoch in range(epochs):
        order = torch.randperm(len(labels), generator=shuffle)
        for indices in order[: len(order) - len(order) % batch].split(batch):
            own = indices.tensor_split(size)[rank]
            optimizer.zero_grad()
            criterion(model(images[own]), labels[own]).backward()
            optimizer.step()
        stats = criterion.stats(sync=True)  # of the batch of all processes: every process must call it
        if rank == 0:
            print(f"epoch {epoch + 1}: {stats}", flush=True)
    return model.module, criterion


def main() -> None:
    parser = argparse.ArgumentParser(description="Digits with DistributedDataParallel and RGD")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=64, help="samples a step, of all processes together")
    parser.add_argument("--tau", type=float, default=1.0)
    parser.add_argument("--normalize", action="store_true", help="weights that average to one over the batch")
    options = parser.parse_args()

    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    model, _ = train(options.epochs, options.batch, rgd.KL(options.tau, normalize=options.normalize))
    if dist.get_rank() == 0:
        images, labels = (tensor[:TEST_SIZE] for tensor in data())
        with torch.no_grad():
            accuracy = (model(images).argmax(1) == labels).double().mean().item()
        print(f"{dist.get_world_size()} processes: test accuracy {accuracy:.1%}")
    # DDP was freed when train() returned. If it outlived the group, torch 2.8 might hang when it frees both.
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
