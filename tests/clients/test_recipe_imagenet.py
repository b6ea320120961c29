"""The recipe for ImageNet, on a folder of small JPEGs: training, going on after a stop, two processes."""

import importlib
import json
import math
import os
import pathlib
import random
import subprocess
import sys

import numpy as np
import pytest
import rgd
import torch
from torch.nn import functional as F

timm = pytest.importorskip("timm", reason="timm is not installed")

from PIL import Image  # noqa: E402
from timm.data import Mixup  # noqa: E402
from timm.loss import SoftTargetCrossEntropy  # noqa: E402
from timm.optim import create_optimizer_v2  # noqa: E402

RECIPE = pathlib.Path(__file__).parents[2] / "examples" / "recipes" / "imagenet.py"
sys.path.insert(0, str(RECIPE.parent))

imagenet = importlib.import_module("imagenet")
# timm's ImageDataset leaves the files that it opens to be closed when they are collected.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    pytest.mark.usefixtures("one_thread"),
]
ALONE = imagenet.Process(0, 1, torch.device("cpu"))
CLASSES, TRAIN, VALIDATION, BATCH = 4, 12, 5, 8
SMALL = (
    *("--model", "test_vit", "--image-size", "32", "--batch", str(BATCH), "--workers", "0"),
    *("--device", "cpu", "--warm-up", "1", "--hold-out", "0.17", "--cutmix", "1"),
)
STEPS = (CLASSES * TRAIN - 8) // BATCH


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images in the layout of ImageNet, brighter the higher the class."""
    root, noise = tmp_path_factory.mktemp("imagenet"), np.random.default_rng(0)
    for part, images in (("train", TRAIN), ("val", VALIDATION)):
        for c in range(CLASSES):
            here = root / part / f"n0144{c}"
            here.mkdir(parents=True)
            for k in range(images):
                pixels = np.clip(noise.normal(60 + 40 * c, 30, (40, 48, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(here / f"n0144{c}_{k}.JPEG")
    return root


def options_of(folder, output, *more):
    return ["--data", str(folder), "--output", str(output), *SMALL, *more]


def parsed(*given):
    options = imagenet.parser().parse_args(given)
    options.precision = options.precision or "float32"
    return options


def data_of(options):
    config = {"input_size": (3, 32, 32), "interpolation": "bicubic", "mean": (0.5,) * 3, "std": (0.5,) * 3}
    return imagenet.read(options, config | {"crop_pct": 0.9})


def log_of(path):
    lines = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def parameters(path):
    return torch.load(path / "last.pt", weights_only=True)["model"]


# --- the whole program ---


def test_each_weighting_is_trained_measured_and_not_trained_twice(folder, tmp_path, capsys):
    command = options_of(folder, tmp_path, "--epochs", "1", "--weighting", "none", "kl", "--tau", "1", "3")
    results = imagenet.main(command)
    assert list(results) == ["none", "kl_tau-1", "kl_tau-3"]
    metrics = ("accuracy", "top5_accuracy", "worst_class_accuracy", "mean_loss", "worst_tenth")
    for name, line in results.items():
        assert (line["epoch"], line["step"]) == (1, STEPS)
        assert {*metrics, *(f"held_out_{metric}" for metric in metrics)} <= set(line)
        assert log_of(tmp_path / name) == [{k: v for k, v in line.items() if k != "seconds"}]
    assert results["none"]["train_effective_sample_size"] == BATCH
    assert results["kl_tau-1"]["train_effective_sample_size"] < BATCH
    assert len({line["mean_loss"] for line in results.values()}) == 3
    assert "kl_tau-3" in capsys.readouterr().out

    written = [(tmp_path / name / "last.pt").stat().st_mtime_ns for name in results]
    assert imagenet.main(command) == results
    assert [(tmp_path / name / "last.pt").stat().st_mtime_ns for name in results] == written


@pytest.fixture
def _read_elsewhere(monkeypatch):
    """Reading leaves the random state alone, as it does where worker processes read."""

    def read(self, key):
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        item = real(self, key)
        for restore, state in zip(
            (random.setstate, np.random.set_state, torch.set_rng_state), states, strict=True
        ):
            restore(state)
        return item

    real = imagenet.Seeded.__getitem__
    monkeypatch.setattr(imagenet.Seeded, "__getitem__", read)


@pytest.mark.usefixtures("_read_elsewhere")
def test_a_run_that_was_stopped_within_an_epoch_goes_on_to_the_same_numbers(folder, tmp_path, monkeypatch):
    command = options_of(
        folder, tmp_path / "whole", "--epochs", "2", "--save-every", "3", "--drop-path", "0.2"
    )
    imagenet.main(command)

    def save_and_stop(path, settings, parts, step, log):
        saved.append(step)
        real(path, settings, parts, step, log)
        if step == 3:
            raise KeyboardInterrupt

    saved, real = [], imagenet.save
    monkeypatch.setattr(imagenet, "save", save_and_stop)
    again = [x.replace("whole", "stopped") for x in command]
    with pytest.raises(KeyboardInterrupt):
        imagenet.main(again)
    random.random(), np.random.rand(), torch.rand(1)
    imagenet.main(again)
    assert saved == [3, 5, 6, 9, 10], "what was trained is not trained again"
    whole, stopped = (tmp_path / name / "kl_tau-1" for name in ("whole", "stopped"))
    assert log_of(stopped) == log_of(whole)
    for name, value in parameters(whole).items():
        assert torch.equal(parameters(stopped)[name], value), name


def test_two_processes_end_as_one(folder, tmp_path):
    more = ("--epochs", "1", "--optimizer", "sgd", "--lr", "0.05", "--normalize")
    imagenet.main(options_of(folder, tmp_path / "one", *more))
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = subprocess.run(
        [*command, RECIPE, *options_of(folder, tmp_path / "two", *more)],
        check=False, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one, two = (tmp_path / name / "kl_tau-1_normalized" for name in ("one", "two"))
    # Each of 5 steps sums over 8 images in another order.
    tolerance = STEPS * BATCH * torch.finfo(torch.float32).eps
    after = parameters(two)
    for name, value in parameters(one).items():
        assert torch.allclose(after[name], value, rtol=tolerance, atol=tolerance), name
    for first, second in zip(log_of(one), log_of(two), strict=True):
        assert second == pytest.approx(first, rel=tolerance, abs=tolerance)


def test_without_weights_it_is_training_by_soft_target_cross_entropy(folder, tmp_path):
    torch.set_default_dtype(torch.float64)
    try:
        command = options_of(folder, tmp_path, "--epochs", "1", "--weighting", "none")
        imagenet.main(command)
        options = parsed(*command)
        data = data_of(options)
        model = imagenet.network(options, CLASSES).train()
        optimizer = create_optimizer_v2(model, opt="adamw", lr=1.0, weight_decay=0.1)
        mixup = Mixup(0.2, 1.0, label_smoothing=0.0, num_classes=CLASSES)
        rows = imagenet.order(data.rows, 0, 0)
        for step in range(STEPS):
            batch = [data.train[0, int(row)] for row in rows[step * BATCH : (step + 1) * BATCH]]
            # Mixup pairs first with last; `own_part` of one process keeps the order.
            images, labels = torch.stack([x for x, _ in batch]).double(), torch.tensor([y for _, y in batch])
            np.random.seed(imagenet.mixed(0, 2, step))
            images, target = mixup(images, labels)
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * (step + 1) / (STEPS + 1)
            optimizer.zero_grad()
            SoftTargetCrossEntropy()(model(images), target).backward()
            optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    # Both round differently at each of 5 steps; AdamW divides by the gradient's size: a million eps at most.
    tolerance = 1e6 * torch.finfo(torch.float64).eps
    found = parameters(tmp_path / "none")
    for name, value in model.state_dict().items():
        assert torch.allclose(found[name], value, rtol=tolerance, atol=tolerance), name


# --- its parts ---


def test_processes_share_a_batch_and_keep_the_pairs_of_mixup():
    batch = np.arange(100, 124)
    for size in (1, 2, 3, 4):
        parts = [imagenet.own_part(batch, rank, size) for rank in range(size)]
        assert sorted(np.concatenate(parts)) == list(batch)
        assert {len(part) for part in parts} == {24 // size}
        assert all((part + part[::-1] == 100 + 123).all() for part in parts)
    assert imagenet.own_part(batch, 0, 1).tolist() == batch.tolist()


def test_the_epoch_and_the_image_decide_the_augmentation(folder):
    data = data_of(parsed(*options_of(folder, "unused")))
    first = data.train[0, 5][0]
    data.train[0, 6]
    assert torch.equal(data.train[0, 5][0], first)
    assert not torch.equal(data.train[1, 5][0], first)
    assert len(data.held_out) == 8
    assert sorted([*data.rows, *data.held_out]) == list(range(CLASSES * TRAIN))


class Fixed(torch.nn.Module):
    """Logits from three pixels and a constant."""

    def forward(self, images):
        return torch.cat([images[:, :, 7, 9], images[:, :1, 0, 0] * 0], 1)


def test_what_is_measured_is_plain(folder):
    options = parsed(*options_of(folder, "unused"))
    data = data_of(options)
    found = imagenet.measure(Fixed(), data.validation, np.arange(20), options, ALONE)
    images = torch.stack([image for image, _ in data.validation])
    target = torch.tensor([label for _, label in data.validation])
    logits = Fixed()(images)
    losses = F.cross_entropy(logits, target, reduction="none").double()
    right = (logits.argmax(1) == target).double()
    expected = {
        "accuracy": right.mean().item(),
        "top5_accuracy": 1.0,
        "worst_class_accuracy": min(right[target == c].mean().item() for c in range(4)),
        "mean_loss": losses.mean().item(),
        "worst_tenth": losses.sort().values[-2:].mean().item(),
    }
    assert found == pytest.approx(expected, rel=20 * torch.finfo(torch.float32).eps)


def test_the_rate_warms_up_and_falls_to_nothing():
    rates = [imagenet.speed(step, 100, 10) for step in range(100)]
    assert rates[:10] == pytest.approx([k / 11 for k in range(1, 11)])
    assert rates[10] == 1
    assert rates[55] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(0.5 + 0.5 * math.cos(math.pi * 89 / 90))


def test_every_pair_of_clip_and_scale_is_a_weighting():
    def found(*more):
        return imagenet.weightings(parsed("--data", "x", *more))

    assert found() == {"kl_tau-1": rgd.KL(1.0)}
    assert found("--weighting", "none") == {"none": rgd.ERM()}
    assert found("--scale", "-0.7") == {"kl_scale--0.7": rgd.KL(scale=-0.7)}
    assert found("--tau", "3", "--normalize") == {"kl_tau-3_normalized": rgd.KL(3.0, normalize=True)}
    assert found("--tau", "1", "3", "--scale", "0.25", "1") == {
        f"kl_tau-{tau:g}_scale-{scale:g}": rgd.KL(tau, scale=scale)
        for tau in (1.0, 3.0)
        for scale in (0.25, 1.0)
    }


# --- what is refused ---


def test_a_checkpoint_of_other_settings_is_refused(folder, tmp_path):
    imagenet.main(options_of(folder, tmp_path, "--epochs", "1"))
    with pytest.raises(ValueError, match=r"other settings \(epochs 1, lr 0\.001\): give those, or another"):
        imagenet.main(options_of(folder, tmp_path, "--epochs", "2", "--lr", "0.1"))


def test_a_folder_in_another_layout_is_refused(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train holds no folders: .*train/<wnid>/\*\.JPEG"):
        imagenet.main(options_of(tmp_path, tmp_path))
    (tmp_path / "train").symlink_to(folder / "train")
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG").touch()
    with pytest.raises(FileNotFoundError, match=r"val holds no folders: .*is flat"):
        imagenet.main(options_of(tmp_path, tmp_path))
    (tmp_path / "val" / "n01440").symlink_to(folder / "val" / "n01440")
    with pytest.raises(ValueError, match=r"same classes: only one of them has .*'n01441'"):
        imagenet.main(options_of(tmp_path, tmp_path))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--batch", "7"), "must be a multiple of 2, .* got 7"),
        (("--batch", "48"), "more than the 40 training images"),
        (("--hold-out", "1"), r"must lie in \[0, 1\)"),
        (("--weighting", "none", "--tau", "3"), "are for --weighting kl"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(more, message, folder, tmp_path):
    with pytest.raises(ValueError, match=message):
        imagenet.main(options_of(folder, tmp_path, *more))
