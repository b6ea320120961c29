"""Token sequences of unequal lengths with a sample weight each, or one a token, for the trainers' tests."""

import torch
from tiny_models import CLASSES

LENGTHS = [4, 9, 6, 3, 8, 5, 7, 4]
GENERATOR = torch.Generator().manual_seed(1)
IDS = [torch.randint(2, CLASSES, (length,), generator=GENERATOR).tolist() for length in LENGTHS]
P = [1.0, 0.25, 0.0, 3.0, 2.0, 0.5, 1.5, 0.75]
BY_TOKEN = [[p * (1 + 0.5 * (i % 3)) for i in range(length)] for p, length in zip(P, LENGTHS, strict=True)]
