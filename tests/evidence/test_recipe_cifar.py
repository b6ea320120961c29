"""The recipe for CIFAR reads the official files, trains as it says, and goes on after a stop."""

import importlib
import io
import math
import pathlib
import pickle
import sys
import zipfile

import numpy as np
import pytest
import rgd
import torch
import torch.nn.functional as F

FOLDER = pathlib.Path(__file__).parents[2] / "examples" / "recipes"
sys.path.insert(0, str(FOLDER))
sys.path.insert(0, str(FOLDER.parent / "evidence"))

from harness import Cell, EdgeError, Grid, Outcome, Store, sweep  # noqa: E402
from harness.results import Table  # noqa: E402

cifar, files = (importlib.import_module(name) for name in ("cifar", "cifar_files"))
SMALL = ("--depth", "8", "--epochs", "2", "--warm-up", "1", "--batch", "32", "--device", "cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


def pickled(content):
    """Bytes as Python 2 and numpy 1 wrote them: protocol 2, numpy's core under its old name."""
    return pickle.dumps(content, protocol=2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def made(folder, name, per_class=15, classes=10, seed=0):
    """A data set in its official layout: images that are brighter, the higher the class."""
    random = np.random.default_rng(seed)
    layout = files.LAYOUTS[name]
    (folder / layout.folder).mkdir(parents=True)

    def batch(n):
        labels = random.permutation(np.arange(n) % classes)
        images = np.clip(random.normal(90 + 10 * (labels[:, None] % 10), 30, (n, 3072)), 0, 255)
        labels = labels.tolist()
        own = {layout.labels: labels, b"data": images.astype(np.uint8), b"filenames": [b"x.png"] * n}
        return own | {b"batch_label": b"made", b"coarse_labels": [0] * n}

    written = {}
    for file in (*layout.train, layout.test):
        written[file] = batch(per_class * classes // len(layout.train))
        (folder / layout.folder / file).write_bytes(pickled(written[file]))
    names = [f"class {k}".encode() for k in range(classes)]
    (folder / layout.folder / layout.meta).write_bytes(pickled({layout.names: names, b"num_vis": 3072}))
    return written


def human(path, **sets):
    """A file of CIFAR-N: an archive of torch that holds a pickle of numpy arrays."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled({k: np.asarray(v) for k, v in sets.items()}))
        archive.writestr("archive/version", b"3\n")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("cifar")
    made(path, "cifar10")
    return path


# --- the files ---


@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 20)])
def test_the_official_layout_is_read_in_its_order(name, classes, tmp_path):
    written = made(tmp_path, name, classes=classes)
    layout = files.LAYOUTS[name]
    found = files.read(tmp_path, name)
    assert found.names == tuple(f"class {k}" for k in range(classes))
    assert found.train_labels.tolist() == [y for f in layout.train for y in written[f][layout.labels]]
    assert found.test_labels.tolist() == written[layout.test][layout.labels]
    assert found.train_images.shape == (15 * classes, 3, 32, 32)
    first, last = written[layout.train[0]][b"data"][0], written[layout.train[-1]][b"data"][-1]
    # Red, green, blue; each plane row by row.
    assert found.train_images[0, 1, 2, 3] == first[1024 + 2 * 32 + 3]
    assert found.train_images[-1].ravel().tolist() == last.tolist()
    assert np.array_equal(files.read(tmp_path / layout.folder, name).test_images, found.test_images)


def test_missing_files_are_named_with_the_archive_that_has_them(tmp_path):
    made(tmp_path, "cifar10")
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks data_batch_3: --data .*cifar-10-python\.tar\.gz"):
        files.read(tmp_path, "cifar10")
    with pytest.raises(FileNotFoundError, match=r"lacks train, test, meta: .* cifar-100-python/"):
        files.read(tmp_path, "cifar100")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>", "is no file of CIFAR's python version"),
        (pickled([1]), "must hold a dictionary, got list"),
        (pickled({b"data": np.zeros((2, 3072), np.uint8)}), "has no b'labels', it has b'data'"),
        (pickled({b"data": np.zeros((2, 9), np.uint8), b"labels": [0, 1]}), r"shape \(2, 3072\).*\(2, 9\)"),
        (pickled({b"data": np.zeros((1, 3072)), b"labels": [0]}), "uint8 images .* got float64"),
        (pickled({b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]}), "from 0 to 9, got 10 to 10"),
        (pickle.dumps({b"data": pathlib.PurePosixPath("x")}, 2), r"asks for pathlib\S*PurePosixPath, which"),
    ],
    ids=["a page", "a list", "no labels", "small images", "float images", "a label too many", "code"],
)
def test_a_file_that_holds_something_else_is_refused(content, message, tmp_path):
    made(tmp_path, "cifar10")
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        files.read(tmp_path, "cifar10")


# --- human labels, long tails, splits ---


def test_human_labels_are_read_in_the_order_of_the_images(tmp_path):
    own = np.arange(60) % 10
    noisy = (own + (np.arange(60) % 3 == 0)) % 10
    path = human(tmp_path / "n.pt", clean_label=own, worse_label=noisy, aggre_label=own)
    assert files.human_labels(path, "worse_label", own, 10).tolist() == noisy.tolist()
    saved = tmp_path / "saved.pt"
    torch.save({"clean_label": own, "noisy_label": noisy}, saved)
    assert files.human_labels(saved, "noisy_label", own, 10).tolist() == noisy.tolist()


def test_a_label_file_of_another_data_set_is_refused(tmp_path):
    own = np.arange(60) % 10
    path = human(tmp_path / "n.pt", clean_label=own, worse_label=own, aggre_label=own[:-1])
    exchanged = own.copy()
    exchanged[[3, 4]] = own[[4, 3]]
    with pytest.raises(ValueError, match=r"clean_label .* differs .* on 2 of 60 images"):
        files.human_labels(path, "worse_label", exchanged, 10)
    with pytest.raises(ValueError, match="--label-set takes one of aggre_label, clean_label, worse_label"):
        files.human_labels(path, "noisy_label", own, 10)
    with pytest.raises(ValueError, match="must hold 60 labels"):
        files.human_labels(path, "aggre_label", own, 10)
    with pytest.raises(FileNotFoundError, match=r"must name CIFAR-10_human\.pt"):
        files.human_labels(tmp_path / "none.pt", "worse_label", own, 10)


def test_the_long_tail_is_the_published_one():
    assert files.long_tail(5000, 100, 10) == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    sizes = files.long_tail(500, 100, 100)
    assert sizes == [int(500 * 0.01 ** (i / 99)) for i in range(100)]
    assert (sum(files.long_tail(5000, 100, 10)), sum(sizes), sizes[0], sizes[-1]) == (12406, 10847, 500, 5)


def test_a_split_holds_out_its_share_of_each_class_and_no_image_is_in_both():
    labels = np.random.default_rng(0).permutation(np.arange(200) % 4)
    train, held_out = files.split(labels, 3, 0.1, [40, 20, 10, 5])
    assert np.bincount(labels[train]).tolist() == [40, 20, 10, 5]
    assert np.bincount(labels[held_out]).tolist() == [5] * 4
    assert not set(train) & set(held_out)
    whole, same = files.split(labels, 3, 0.1, None)
    assert np.bincount(labels[whole]).tolist() == [45] * 4
    assert same.tolist() == held_out.tolist()
    assert files.split(labels, 4, 0.1, None)[1].tolist() != held_out.tolist()


# --- network, crops, arms ---


@pytest.mark.parametrize(("depth", "published"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85)])
def test_the_network_has_the_published_number_of_parameters(depth, published):
    # He et al. 2016, table 6, in millions.
    count = sum(p.numel() for p in cifar.ResNet(depth, 10).parameters())
    assert round(count / 1e6, 2) == published
    assert depth != 32 or count == 464_154


def test_the_network_has_its_depth_and_shortcuts_without_parameters():
    model = cifar.ResNet(32, 10)
    layers = [m for m in model.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    assert len(layers) == 32
    block = cifar.Block(16, 32).eval()
    torch.nn.init.zeros_(block.norm2.weight)
    x = torch.rand(2, 16, 8, 8)
    expected = torch.zeros(2, 32, 4, 4)
    expected[:, 8:24] = x[:, :, ::2, ::2]
    assert torch.equal(block(x), expected)
    with pytest.raises(ValueError, match=r"must be 6 n \+ 2"):
        cifar.ResNet(30, 10)


def test_crops_and_flips_are_those_of_each_image():
    random = np.random.default_rng(0)
    images = random.random((8, 3, 6, 6))
    corners, flips = random.integers(0, 9, (8, 2)), np.arange(8) % 2 == 0
    found = cifar.crop_and_flip(*map(torch.from_numpy, (images, corners, flips)))
    padded = np.pad(images, ((0, 0), (0, 0), (4, 4), (4, 4)))
    for k, (row, column) in enumerate(corners):
        cut = padded[k, :, row : row + 6, column : column + 6]
        assert np.array_equal(found[k], cut[:, :, ::-1] if flips[k] else cut)


def test_each_arm_trains_on_the_loss_of_its_name():
    counts = torch.tensor([50, 20, 5])
    criteria = {name: arm.criterion(counts) for name, arm in cifar.ARMS.items()}
    assert all(type(c).__mro__[1].__name__ == "RGDLoss" for c in criteria.values())
    weightings = {name: criterion.weighting for name, criterion in criteria.items()}
    assert weightings == {
        "ERM": rgd.ERM(), "RGD": rgd.KL(1.0), "s=-0.7": rgd.KL(scale=-0.7), "class-balanced": rgd.ERM(),
        "logit-adjustment": rgd.ERM(), "RGD-on-logit-adjustment": rgd.KL(1.0),
    }  # fmt: skip
    adjusted = {name for name, c in criteria.items() if c.logit_adjustment is not None}
    assert adjusted == {"logit-adjustment", "RGD-on-logit-adjustment"}
    prior = torch.tensor(rgd.log_prior([50, 20, 5])).float()
    assert torch.equal(criteria["logit-adjustment"].logit_adjustment, prior)
    weights = torch.tensor(rgd.class_balanced([50, 20, 5])).float()
    assert torch.equal(criteria["class-balanced"].weight, weights)
    assert [name for name, c in criteria.items() if c.weight is not None] == ["class-balanced"]
    assert len({arm.key() for arm in cifar.ARMS.values()}) == len(cifar.ARMS)


def test_an_arm_brings_the_one_it_is_compared_with():
    names = [arm.name for arm in cifar.chosen_arms(["RGD-on-logit-adjustment"], [0.5, -0.7])]
    assert names == ["ERM", "logit-adjustment", "RGD-on-logit-adjustment", "s=0.5", "s=-0.7"]
    assert [arm.name for arm in cifar.chosen_arms(["s=-0.7"], [-0.7])] == ["ERM", "s=-0.7"]
    alone = cifar.chosen_arms(["RGD-on-logit-adjustment"], [0.5], alone=True)
    assert [arm.name for arm in alone] == ["RGD-on-logit-adjustment", "s=0.5"]


# --- training ---


def problem_of(folder, *more):
    options = cifar.parser().parse_args(["--data", str(folder), *SMALL, *more])
    return cifar.prepared(options, "float32")


def trainer_of(folder):
    return cifar.Trainer(Store(folder / "runs.jsonl"), folder, torch.device("cpu"))


def plain_training(problem, seed, cell):
    """The same training in the words of torch alone; returns the mean loss on the test images."""
    train, _, test = problem.draw(seed)
    images, target = train.inputs.double(), train.target
    mean, deviation = images.mean((0, 2, 3), True), images.std((0, 2, 3), correction=0, keepdim=True)
    torch.manual_seed(1000 + seed)
    model = cifar.ResNet(problem.depth, problem.outputs)
    optimizer = torch.optim.SGD(model.parameters(), 1.0, 0.9, weight_decay=cell.weight_decay)
    batches = len(target) // problem.batch_size
    steps, step = batches * problem.epochs, 0
    for epoch in range(problem.epochs):
        random = np.random.default_rng([62, seed, epoch])
        order = random.permutation(len(target))
        corners, flips = random.integers(0, 9, (len(target), 2)), random.random(len(target)) < 0.5
        for rows in order[: batches * problem.batch_size].reshape(batches, -1):
            padded = F.pad((images[rows] - mean) / deviation, (4, 4, 4, 4))
            cuts = [x[:, a : a + 32, b : b + 32] for x, (a, b) in zip(padded, corners[rows], strict=True)]
            cuts = [cut.flip(2) if flip else cut for cut, flip in zip(cuts, flips[rows], strict=True)]
            warm = min(1.0, (step + 1) / (batches + 1))
            for group in optimizer.param_groups:
                group["lr"] = cell.learning_rate * warm * (1 + math.cos(math.pi * step / steps)) / 2
            optimizer.zero_grad()
            F.cross_entropy(model(torch.stack(cuts)), target[rows]).backward()
            optimizer.step()
            step += 1
    model.eval()
    with torch.no_grad():
        return F.cross_entropy(model((test.inputs - mean) / deviation), test.target).item()


def test_erm_is_plain_training_by_cross_entropy(folder, tmp_path):
    torch.set_default_dtype(torch.float64)
    try:
        problem, cell = problem_of(folder), Cell(0.05, 1e-3)
        found = trainer_of(tmp_path).run(problem, cifar.ARMS["ERM"], 1, cell)
        expected = plain_training(problem, 1, cell)
        other = trainer_of(tmp_path).run(problem, cifar.ARMS["RGD"], 1, cell)
    finally:
        torch.set_default_dtype(torch.float32)
    # Both round differently at each of 8 steps, and normalised layers magnify that: a million eps at most.
    tolerance = 1e6 * torch.finfo(torch.float64).eps
    assert found.test["mean_loss"] == pytest.approx(expected, rel=tolerance)
    assert other.test["mean_loss"] != pytest.approx(expected, rel=1000 * tolerance)
    assert found.mean_weight == 1
    assert other.mean_weight > 1


def test_a_run_that_was_stopped_goes_on_to_the_same_result(folder, tmp_path, monkeypatch):
    problem, cell, arm = problem_of(folder), Cell(0.05, 1e-3), cifar.ARMS["RGD"]
    whole = trainer_of(tmp_path / "whole").run(problem, arm, 0, cell)
    written = []

    def write_and_stop(content, path):
        real(content, path)
        written.append(content["epoch"])
        if content["epoch"] == 1:
            raise KeyboardInterrupt

    real = cifar.write
    monkeypatch.setattr(cifar, "write", write_and_stop)
    trainer = trainer_of(tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt):
        trainer.run(problem, arm, 0, cell)
    assert len(list((tmp_path / "stopped").glob("*.pt"))) == 1
    again = trainer.run(problem, arm, 0, cell)
    assert written == [1, 2], "the first epoch is trained once"
    assert (again.validation, again.test, again.mean_weight) == (
        whole.validation,
        whole.test,
        whole.mean_weight,
    )
    assert not list((tmp_path / "stopped").glob("*.pt"))


def test_training_sees_the_human_labels_and_the_test_its_own(folder, tmp_path):
    own = files.read(folder, "cifar10")
    noisy = (own.train_labels + 1) % 10
    path = human(tmp_path / "n.pt", clean_label=own.train_labels, worse_label=noisy)
    problem = problem_of(folder, "--labels", str(path))
    assert problem.name == "CIFAR-10, worse_label (100.0% wrong)"
    train, validation, test = problem.draw(0)
    truth = {image.tobytes(): label for image, label in zip(own.train_images, own.train_labels, strict=True)}
    for part in (train, validation):
        wrong = [truth[image.numpy().tobytes()] for image in part.inputs]
        assert part.target.tolist() == [(label + 1) % 10 for label in wrong]
    assert test.target.tolist() == own.test_labels.tolist()
    assert problem.key() != problem_of(folder).key()


def test_a_long_tail_leaves_the_held_out_part_balanced(folder, capsys):
    problem = problem_of(folder, "--imbalance", "9")
    train, validation, _ = problem.draw(0)
    assert train.target.bincount().tolist() == files.long_tail(13, 9, 10)
    assert validation.target.bincount().tolist() == [2] * 10
    assert "13 (class 0) to 1 (class 9)" in capsys.readouterr().out


def test_the_schedules_warm_up_and_end_as_said(folder):
    step = problem_of(folder, "--epochs", "8", "--warm-up", "2", "--schedule", "step")
    rates = [step.speed(k, 80) for k in range(80)]
    assert rates[:20] == sorted(rates[:20])
    assert rates[0] == pytest.approx(1 / 21)
    assert rates[20:40] == [1.0] * 20
    assert rates[40:] == [0.1] * 20 + [0.01] * 20
    cosine = problem_of(folder, "--epochs", "8", "--warm-up", "0")
    assert cosine.speed(0, 80) == 1
    assert cosine.speed(40, 80) == pytest.approx(0.5)


# --- the command ---


def test_the_command_compares_two_arms_and_trains_nothing_twice(folder, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    command = ["--data", str(folder), *SMALL, "--seeds", "2", "--arms", "RGD"]
    command += ["--untuned", "0.05", "1e-3", "--precision", "bfloat16", "--output", str(output)]
    table = cifar.main(command)
    assert table.arms("CIFAR-10") == ["ERM", "RGD"]
    assert table.line("CIFAR-10", "RGD", "worst_tenth").baseline == "ERM"
    assert {run["grid"] for run in table.runs} == {"NOT TUNED"}
    assert (output / "cifar.png").read_bytes().startswith(b"\x89PNG")
    assert Table.read(output / "cifar.csv").runs == table.runs
    printed = capsys.readouterr().out
    assert "balanced_accuracy" in printed
    assert "CIFAR-10 on cpu in bfloat16" in printed

    monkeypatch.setattr(cifar.Trainer, "run", lambda *_: pytest.fail("trained again"))
    assert cifar.main(command).runs == table.runs


def outcomes(score):
    """A trainer that trains nothing; the score of a cell and a seed."""

    def run(self, problem, arm, seed, cell):
        calls.append((arm.name, seed, cell))
        metrics = dict.fromkeys(cifar.METRICS, 0.5) | {"accuracy": score(cell, seed)}
        return Outcome(metrics, metrics, 1.2, 0.0)

    calls = []
    return run, calls


def test_each_seed_chooses_its_cell_inside_the_grid(folder, tmp_path, monkeypatch):
    def score(cell, seed):
        best = 0.4 if seed < 2 else 0.1
        return 1 - abs(math.log(cell.learning_rate / best)) / 10 - abs(cell.weight_decay - 5e-4)

    run, calls = outcomes(score)
    monkeypatch.setattr(cifar.Trainer, "run", run)
    command = ["--data", str(folder), *SMALL, "--seeds", "5", "--controls", "--arms", "RGD"]
    table = cifar.main([*command, "--output", str(tmp_path)])
    controls = ["RGD, mean one", "plain x mean weight of RGD", "RGD, opposite sign"]
    assert table.arms("CIFAR-10") == ["ERM", "RGD", *controls]
    for row in table.runs:
        rate = "0.4" if int(row["seed"]) < 2 else "0.1"
        assert (row["learning_rate"], row["weight_decay"]) == (rate, "0.0005")
        assert ("5 rates 0.05 to 0.8" in row["grid"]) == (rate == "0.4")
    of_erm = [(seed, cell) for name, seed, cell in calls if name == "ERM"]
    assert len(of_erm) == len(set(of_erm)) == 2 * 15 + 3 * 9


def test_arms_trained_alone_are_found_by_the_command_that_makes_the_table(folder, tmp_path, monkeypatch):
    run, calls = outcomes(lambda cell, seed: 0.5 - 0.1 * abs(math.log(cell.learning_rate / 0.1)))
    monkeypatch.setattr(cifar.Trainer, "run", run)
    command = ["--data", str(folder), *SMALL, "--seeds", "2", "--decays", "0", "1e-3"]
    command += ["--output", str(tmp_path)]
    assert cifar.main([*command, "--only", "--arms", "RGD", "--scale", "0.5"]) is None
    assert {name for name, _, _ in calls} == {"RGD", "s=0.5"}
    assert not list(tmp_path.glob("*.csv"))
    alone = len(calls)
    table = cifar.main([*command, "--arms", "RGD", "--scale", "0.5"])
    assert table.arms("CIFAR-10") == ["ERM", "RGD", "s=0.5"]
    assert {name for name, _, _ in calls[alone:]} == {"ERM"}


def test_a_best_rate_at_the_edge_is_an_error(folder, tmp_path, monkeypatch):
    run, _ = outcomes(lambda cell, _seed: cell.learning_rate)
    monkeypatch.setattr(cifar.Trainer, "run", run)
    with pytest.raises(EdgeError, match="is at the edge after"):
        cifar.main(["--data", str(folder), *SMALL, "--seeds", "2", "--output", str(tmp_path)])


def test_runs_one_by_one_are_kept_as_they_finish(folder, tmp_path):
    def trainer(problem, arm, seeds, cells, snapshots):
        assert len(seeds) == len(cells) == 1
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append((*seeds, *cells))
        return {done[-1]: [Outcome({"accuracy": 0.5}, {}, 1.0, 0.0)]}

    done = []
    grid = Grid((0.1, 0.2, 0.4), (0.0, 0.1))
    store = Store(tmp_path / "runs.jsonl")
    with pytest.raises(KeyboardInterrupt):
        sweep(
            problem_of(folder), cifar.ARMS["ERM"], grid=grid, seeds=2, store=store, trainer=trainer,
            one_by_one=True,
        )  # fmt: skip
    assert len(Store(tmp_path / "runs.jsonl").outcomes) == 3


def test_a_stop_says_how_to_go_on(folder, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cifar.Trainer, "run", stop)
    with pytest.raises(SystemExit, match="the same command goes on"):
        cifar.main(["--data", str(folder), *SMALL, "--output", str(tmp_path)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--labels", "x.pt", "--imbalance", "10"], "give one of them"),
        (["--label-set", "worse_label"], "give the file with --labels"),
        (["--imbalance", "1"], "above 1, got 1"),
        (["--seeds", "1"], "at least 2"),
        (["--validation", "1"], "between 0 and 1"),
        (["--only"], "give one of them"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        cifar.main(["--data", "nowhere", *options])


def test_a_batch_larger_than_the_training_set_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="--batch 500 is more than the 130 training images"):
        trainer_of(tmp_path).run(problem_of(folder, "--batch", "500"), cifar.ARMS["ERM"], 0, Cell(0.1, 0.0))


def test_the_reader_of_pickles_runs_no_code(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (pathlib.Path.touch, (tmp_path / "touched",))

    with pytest.raises(pickle.UnpicklingError, match="no file of CIFAR needs"):
        files.Plain(io.BytesIO(pickle.dumps(Harmful()))).load()
    assert not (tmp_path / "touched").exists()
