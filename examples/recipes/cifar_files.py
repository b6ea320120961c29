"""CIFAR-10 and CIFAR-100 in their official python layout, and the human labels of CIFAR-N.

    cifar-10-batches-py/   data_batch_1 ... data_batch_5, test_batch, batches.meta
    cifar-100-python/      train, test, meta

from https://www.cs.toronto.edu/~kriz/cifar.html ("python version", unpacked). CIFAR-N is `CIFAR-10_human.pt`
(clean_label, aggre_label, worse_label, random_label1, random_label2, random_label3) and `CIFAR-100_human.pt`
(clean_label, noisy_label) from https://github.com/UCSC-REAL/cifar-10-100n.
"""

from __future__ import annotations

import _codecs
import pathlib
import pickle
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]
SIDE, CHANNELS = 32, 3
HOME = "https://www.cs.toronto.edu/~kriz/cifar.html"


class Layout(NamedTuple):
    """Names of a data set's files and of what they hold."""

    archive: str
    folder: str
    train: tuple[str, ...]
    test: str
    meta: str
    labels: bytes
    names: bytes


LAYOUTS = {
    "cifar10": Layout(
        "cifar-10-python.tar.gz", "cifar-10-batches-py", tuple(f"data_batch_{k}" for k in range(1, 6)),
        "test_batch", "batches.meta", b"labels", b"label_names",
    ),
    "cifar100": Layout(
        "cifar-100-python.tar.gz", "cifar-100-python", ("train",), "test", "meta", b"fine_labels",
        b"fine_label_names",
    ),
}  # fmt: skip


class Cifar(NamedTuple):
    """Images (n, 3, 32, 32) and labels (n,), to train and to test, and the names of the classes."""

    train_images: Images
    train_labels: Labels
    test_images: Images
    test_labels: Labels
    names: tuple[str, ...]


# The names that a pickle of numpy arrays needs. Other names are refused, so that no file can run code.
PLAIN = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _codecs.encode,
}


def _reconstruct() -> Any:
    try:
        from numpy._core.multiarray import _reconstruct as found  # noqa: PLC0415
    except ImportError:  # numpy 1
        from numpy.core.multiarray import _reconstruct as found  # noqa: PLC0415
    return found


class Plain(pickle.Unpickler):
    """Reads lists, dictionaries, numbers, bytes and numpy arrays."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return _reconstruct()
        if (module, name) not in PLAIN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no file of CIFAR needs")
        return PLAIN[module, name]


def unpickled(path: pathlib.Path) -> dict[bytes, Any]:
    """A file of CIFAR: a dictionary with keys in bytes, as Python 2 wrote it."""
    try:
        with path.open("rb") as file:
            found = Plain(file, encoding="bytes").load()
    except (pickle.UnpicklingError, EOFError, ValueError) as error:
        raise ValueError(f"{path} is no file of CIFAR's python version: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a dictionary, got {type(found).__name__}")
    return found


def entry(content: dict[bytes, Any], key: bytes, path: pathlib.Path) -> Any:
    """The entry of a key in a file."""
    if key not in content:
        keys = ", ".join(repr(k) for k in content)
        raise ValueError(f"{path} has no {key!r}, it has {keys}: is it the file of another data set?")
    return content[key]


def read(data: pathlib.Path, name: str) -> Cifar:
    """A data set of a folder.

    Args:
        data: The folder that holds `cifar-10-batches-py` or `cifar-100-python`, or that folder itself.
        name: "cifar10" or "cifar100".

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file holds something else.
    """
    layout = LAYOUTS[name]
    folder = data if data.name == layout.folder else data / layout.folder
    missing = [f for f in (*layout.train, layout.test, layout.meta) if not (folder / f).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(missing)}: --data must name the folder that holds {layout.folder}/, "
            f"which {layout.archive} of {HOME} unpacks to"
        )
    meta = folder / layout.meta
    names = tuple(n.decode() for n in entry(unpickled(meta), layout.names, meta))
    images, labels = zip(*(part(folder / f, layout, len(names)) for f in layout.train), strict=True)
    test = part(folder / layout.test, layout, len(names))
    return Cifar(np.concatenate(images), np.concatenate(labels), *test, names)


def part(path: pathlib.Path, layout: Layout, classes: int) -> tuple[Images, Labels]:
    """Images and labels of one file."""
    content = unpickled(path)
    images = np.asarray(entry(content, b"data", path))
    labels = np.asarray(entry(content, layout.labels, path), dtype=np.int64)
    if images.dtype != np.uint8 or images.shape != (len(labels), CHANNELS * SIDE * SIDE):
        raise ValueError(
            f"{path} must hold uint8 images of shape ({len(labels)}, {CHANNELS * SIDE * SIDE}), one a label, "
            f"got {images.dtype} of shape {images.shape}"
        )
    check_range(labels, classes, path)
    return images.reshape(-1, CHANNELS, SIDE, SIDE), labels


def check_range(labels: Labels, classes: int, path: pathlib.Path) -> None:
    """Labels must be classes."""
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(
            f"{path} must hold labels from 0 to {classes - 1}, got {labels.min()} to {labels.max()}"
        )


def human_labels(path: pathlib.Path, key: str, own: Labels, classes: int) -> Labels:
    """A set of labels of CIFAR-N, in the order of the data set's files.

    Args:
        path: `CIFAR-10_human.pt` or `CIFAR-100_human.pt`.
        key: Which of its sets, such as "worse_label".
        own: The data set's own training labels, which `clean_label` must repeat.
        classes: How many classes there are.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it has no such set, or belongs to another data set or another order.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: --labels must name CIFAR-10_human.pt or CIFAR-100_human.pt of "
            "https://github.com/UCSC-REAL/cifar-10-100n"
        )
    reconstruct, dtype = _reconstruct(), np.dtypes.Int64DType
    globals_: list[Any] = [np.ndarray, np.dtype, dtype, _codecs.encode]
    globals_ += [(reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
    with torch.serialization.safe_globals(globals_):
        content = torch.load(path, weights_only=True)
    sets = sorted(name for name in content if name.endswith("_label") or name.startswith("random_label"))
    for name in ("clean_label", key):
        if name not in content:
            raise ValueError(f"{path} has no {name!r}: --label-set takes one of {', '.join(sets)}")
    clean, labels = (np.asarray(content[name], dtype=np.int64) for name in ("clean_label", key))
    if clean.shape != own.shape or labels.shape != own.shape:
        raise ValueError(
            f"{path} must hold {len(own)} labels, one a training image, got {clean.shape} as clean_label and "
            f"{labels.shape} as {key}"
        )
    wrong = int((clean != own).sum())
    if wrong:
        raise ValueError(
            f"clean_label of {path} differs from the data set's own labels on {wrong} of {len(own)} images: "
            "the file belongs to another data set, or the images are in another order"
        )
    check_range(labels, classes, path)
    return labels


def long_tail(largest: int, factor: float, classes: int) -> list[int]:
    """Images of class i: the whole part of `largest * (1 / factor) ** (i / (C - 1))`.

    Cao et al., "Learning imbalanced datasets with label-distribution-aware margin loss", NeurIPS 2019.
    """
    return [max(1, int(largest * (1 / factor) ** (i / (classes - 1)))) for i in range(classes)]


def split(
    labels: Labels, seed: int, validation: float, sizes: Sequence[int] | None
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Rows for training and rows for validation.

    Args:
        labels: The labels of the training set.
        seed: Decides which rows; it is the same for every arm.
        validation: The share of each class that is held out for validation.
        sizes: How many rows of each class to train on; None for all that are left.
    """
    random = np.random.default_rng([61, seed])
    train: list[npt.NDArray[np.intp]] = []
    held_out: list[npt.NDArray[np.intp]] = []
    for c in range(int(labels.max()) + 1):
        rows = random.permutation(np.flatnonzero(labels == c))
        out = held(len(rows), validation)
        held_out.append(rows[:out])
        train.append(rows[out : None if sizes is None else out + sizes[c]])
    return np.concatenate(train), np.concatenate(held_out)


def held(rows: int, validation: float) -> int:
    """How many of a class's rows are held out."""
    return max(1, round(validation * rows))
