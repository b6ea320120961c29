"""Few-shot classification: tasks of N ways and K shots, the classes they are drawn from, and the networks.

A task shows K images each of N classes and asks for the class of further images of them. Classes of
meta-training, validation and test are apart. Readers are here for scikit-learn's digits and for the folders
of Omniglot and mini-ImageNet.
"""

from __future__ import annotations

import functools
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from harness.problems import load

DIGITS = (4, 3, 3)  # digits to meta-train, to validate, to test
MIRRORED = (3, 4, 6, 7, 9)  # digits whose mirror image is a figure of its own, and no digit
OMNIGLOT_SIDE, MINI_IMAGENET_SIDE, OMNIGLOT_VALIDATION = 28, 84, 0.2
SUFFIXES = (".png", ".jpg", ".jpeg")


class Tasks(NamedTuple):
    """Points to adapt to and points to measure at, each with tasks in front, (T, n, ...).

    Classes are one-hot, (T, n, N).
    """

    x: Tensor
    y: Tensor
    x_query: Tensor
    y_query: Tensor


class Classes(NamedTuple):
    """Images of each class (C, most, ...), how many of them are real (C,), and what each class is called."""

    images: Tensor
    counts: Tensor
    names: tuple[str, ...]

    @classmethod
    def of(cls, images: Sequence[Tensor], names: Sequence[str]) -> Classes:
        """From the images of each class, (n, ...) with any n."""
        counts = torch.tensor([len(some) for some in images])
        padded = images[0].new_zeros(len(images), int(counts.max()), *images[0].shape[1:])
        for row, some in zip(padded, images, strict=True):
            row[: len(some)] = some
        return cls(padded, counts, tuple(names))

    def only(self, rows: Sequence[int]) -> Classes:
        """Some of the classes."""
        return Classes(self.images[rows], self.counts[rows], tuple(self.names[k] for k in rows))

    def turned(self, turns: Sequence[int] = range(4)) -> Classes:
        """The images (..., h, w) of each class, and the same turned by quarters as further classes."""
        names = [f"{name}, turned by {90 * k}" if k else name for k in turns for name in self.names]
        images = torch.cat([torch.rot90(self.images, k, (-2, -1)) for k in turns])
        return Classes(images, self.counts.repeat(len(turns)), tuple(names))


class Parts(NamedTuple):
    """Classes that share nothing: to meta-train, to choose, to measure."""

    train: Classes
    validation: Classes
    test: Classes

    def check(self, ways: int, images: int) -> None:
        """Refuses parts from which no task of `ways` classes, `images` of each, can be drawn."""
        for part, classes in zip(self._fields, self, strict=True):
            if len(classes.names) < ways:
                raise ValueError(
                    f"a task takes {ways} classes, and the {part} part has {len(classes.names)}. "
                    "Lower --ways, or add classes."
                )
            fewest = int(classes.counts.argmin())
            if classes.counts[fewest] < images:
                raise ValueError(
                    f"a task takes {images} images of a class, to adapt to and to measure, and "
                    f"{classes.names[fewest]} of the {part} part has {int(classes.counts[fewest])}. "
                    "Lower --shots, or add images."
                )


def draw_tasks(  # noqa: PLR0917
    classes: Classes, tasks: int, ways: int, shots: int, queries: int, generator: torch.Generator
) -> Tasks:
    """Tasks of `ways` classes in random order, each with `shots` and `queries` images; none comes twice."""
    chosen = torch.rand(tasks, len(classes.names), generator=generator).argsort(1)[:, :ways]
    most = classes.images.shape[1]
    order = torch.rand(tasks, ways, most, generator=generator)
    order.masked_fill_(torch.arange(most) >= classes.counts[chosen][..., None], -1)
    picked = order.topk(shots + queries, -1).indices
    x = classes.images[chosen[..., None], picked]
    if x.dtype == torch.uint8:
        x = x.float() / 255
    y = torch.eye(ways)[:, None].expand(tasks, ways, shots + queries, ways)
    parts = ((x[:, :, :shots], y[:, :, :shots]), (x[:, :, shots:], y[:, :, shots:]))
    return Tasks(*(values.flatten(1, 2) for pair in parts for values in pair))


# --- the classes ---


@functools.cache
def digit_parts(seed: int) -> Parts:
    """scikit-learn's digits, upright and turned by 90 degrees, five of them mirrored too; pixels in rows.

    All classes of a digit are in one part, so that no handwriting of a test class was seen before. Half turns
    are left out: they make a 9 of a 6.
    """
    inputs, target = load("digits")
    images = torch.tensor(2.5 * (inputs - 0.3), dtype=torch.float32).view(-1, 8, 8)
    order = np.random.default_rng([51, seed]).permutation(10)
    parts: list[Classes] = []
    for digits in np.split(order, np.cumsum(DIGITS)[:-1]):
        figures = {f"digit {d}": images[target == d] for d in digits}
        figures |= {f"digit {d}, mirrored": images[target == d].flip(2) for d in digits if d in MIRRORED}
        classes = Classes.of([*figures.values()], [*figures]).turned((0, 1))
        parts.append(classes._replace(images=classes.images.flatten(2)))
    return Parts(*parts)


def read_classes(folder: pathlib.Path, pattern: str, option: str, side: int, color: bool) -> Classes:
    """Images of each folder that matches `pattern`, scaled to `side` by `side` pixels of 0 to 255.

    Raises:
        FileNotFoundError: If the folder is missing, or holds no images in this layout.
    """
    from PIL import Image  # noqa: PLC0415

    layout = (
        f"{option} takes a folder that holds {folder.name}/{pattern}/, with the images of a class in each"
    )
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is missing: {layout}")
    names: list[str] = []
    images: list[Tensor] = []
    for place in sorted(path for path in folder.glob(pattern) if path.is_dir()):
        files = sorted(path for path in place.iterdir() if path.suffix.lower() in SUFFIXES)
        pixels: list[Tensor] = []
        for path in files:
            with Image.open(path) as image:
                small = image.convert("RGB" if color else "L").resize((side, side), Image.Resampling.LANCZOS)
            pixels.append(torch.from_numpy(np.array(small)).view(side, side, -1).movedim(-1, 0))
        if pixels:
            names.append(place.relative_to(folder).as_posix())
            images.append(torch.stack(pixels))
    if not names:
        raise FileNotFoundError(f"{folder} holds no images ({', '.join(SUFFIXES)}): {layout}")
    return Classes.of(images, names)


def omniglot(folder: pathlib.Path) -> Callable[[int], Parts]:
    """Parts of a seed: a fifth of the background characters chooses, the evaluation characters test.

    `folder` holds `images_background` and `images_evaluation`, each with `<alphabet>/<character>/*.png`,
    black ink on white. Turns by 90, 180 and 270 degrees are further classes, in the part of their character.
    """
    background, evaluation = (
        read_classes(folder / name, "*/*", "--omniglot", OMNIGLOT_SIDE, color=False)
        for name in ("images_background", "images_evaluation")
    )
    background, evaluation = (c._replace(images=255 - c.images) for c in (background, evaluation))
    validation = math.ceil(OMNIGLOT_VALIDATION * len(background.names))

    def parts(seed: int) -> Parts:
        order = np.random.default_rng([52, seed]).permutation(len(background.names)).tolist()
        choose, train = background.only(order[:validation]), background.only(order[validation:])
        return Parts(train.turned(), choose.turned(), evaluation.turned())

    return parts


def mini_imagenet(folder: pathlib.Path, side: int = MINI_IMAGENET_SIDE) -> Callable[[int], Parts]:
    """Parts, the same for every seed, from `train/<wnid>/*.jpg`, `val/<wnid>/*.jpg`, `test/<wnid>/*.jpg`."""
    parts = Parts(
        *(
            read_classes(folder / name, "*", "--mini-imagenet", side, color=True)
            for name in ("train", "val", "test")
        )
    )
    return lambda seed: parts


# --- the convolutional network ---


def initial_convolutions(channels: int, side: int, filters: int, outputs: int, seed: int) -> list[Tensor]:
    """Of four blocks kernel (f, c, 3, 3), gain and shift (f, 1, 1); weights and bias of the last layer."""
    generator = torch.Generator().manual_seed(1000 + seed)

    def uniform(*shape: int, inputs: int) -> Tensor:
        return (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(inputs)

    parameters: list[Tensor] = []
    for _ in range(4):
        parameters += [uniform(filters, channels, 3, 3, inputs=9 * channels)]
        parameters += [torch.ones(filters, 1, 1), torch.zeros(filters, 1, 1)]
        channels, side = filters, side // 2
    features = filters * side * side
    return [*parameters, uniform(features, outputs, inputs=features), torch.zeros(1, outputs)]


def convolutions(parameters: Sequence[Tensor], x: Tensor) -> Tensor:
    """Logits (n, N) of images (n, c, h, w): four blocks of convolution, batch norm, ReLU, maximum of 2 by 2.

    The batch norm always takes mean and variance of the images it is given, as Finn et al. do.
    """
    blocks = zip(parameters[:-2:3], parameters[1:-2:3], parameters[2:-2:3], strict=True)
    for kernel, gain, shift in blocks:
        x = F.conv2d(x, kernel, padding=1)
        centred = x - x.mean((0, 2, 3), keepdim=True)
        x = centred * (centred.square().mean((0, 2, 3), keepdim=True) + 1e-5).rsqrt() * gain + shift
        rows, columns = x.shape[-2] // 2, x.shape[-1] // 2
        windows = x[..., : 2 * rows, : 2 * columns].unflatten(-1, (columns, 2)).unflatten(-3, (rows, 2))
        x = windows.amax((-3, -1)).relu()
    return x.flatten(1) @ parameters[-2] + parameters[-1]
