"""Few-shot tasks are drawn, adapted to, weighted and read from folders as the meta-learning program says."""

import dataclasses
import importlib
import itertools
import json
import math
import pathlib
import sys

import numpy as np
import pytest
import rgd
import torch
from PIL import Image
from torch import nn

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples" / "evidence"))

from harness import Arm, Cell, Store, few_shot, meta
from harness.few_shot import Classes, Parts, Tasks
from harness.problems import load
from harness.sweep import run_cells
from harness.train import Outcome

maml = importlib.import_module("maml")
EPS = torch.finfo(torch.float64).eps
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def numbered(counts):
    """Classes whose images are numbers: image k of class c is the single pixel 100 c + k + 1."""
    images = [100.0 * c + torch.arange(1, n + 1)[:, None] for c, n in enumerate(counts)]
    return Classes.of(images, [f"c{c}" for c in range(len(counts))])


# --- tasks ---


def test_a_task_has_n_ways_and_k_shots_and_shows_no_image_twice():
    ways, shots, queries = 4, 2, 3
    counts = (9, 5, 7, 6, 12, 5)
    tasks = few_shot.draw_tasks(numbered(counts), 200, ways, shots, queries, generator())
    assert tasks.x.shape == (200, ways * shots, 1)
    assert tasks.x_query.shape == (200, ways * queries, 1)
    seen = set()
    for x, y, x_query, y_query in zip(*tasks, strict=True):
        assert y.sum(0).tolist() == [shots] * ways
        assert y_query.sum(0).tolist() == [queries] * ways
        pixels, labels = torch.cat([x, x_query])[:, 0], torch.cat([y, y_query]).argmax(1)
        assert len(pixels.unique()) == ways * (shots + queries), "an image came twice"
        assert pixels.min() >= 1, "what fills up a small class is no image"
        of_class = (pixels - 1).div(100, rounding_mode="floor")
        one_each = {(int(label), int(c)) for label, c in zip(labels, of_class, strict=True)}
        assert len(one_each) == len({c for _, c in one_each}) == ways
        seen |= one_each
    assert seen == set(itertools.product(range(ways), range(len(counts)))), "any class has any label"


def test_every_image_is_drawn():
    classes = numbered((3, 4, 5))
    tasks = few_shot.draw_tasks(classes, 300, 3, 1, 2, generator())
    drawn = set(torch.cat([tasks.x, tasks.x_query], 1).flatten().int().tolist())
    assert drawn == {100 * c + k + 1 for c, n in enumerate((3, 4, 5)) for k in range(n)}


def test_bytes_become_numbers_from_0_to_1():
    images = torch.full((2, 3, 1), 255, dtype=torch.uint8)
    tasks = few_shot.draw_tasks(Classes.of([*images], ["a", "b"]), 1, 2, 1, 1, generator())
    assert tasks.x.flatten().tolist() == [1.0, 1.0]


def test_parts_too_small_for_a_task_are_refused_with_what_to_lower():
    large, few, small = numbered((9, 9, 9)), numbered((9, 9)), numbered((9, 5, 9))
    Parts(large, large, large).check(3, 9)
    with pytest.raises(ValueError, match=r"3 classes, and the validation part has 2\. Lower --ways"):
        Parts(large, few, large).check(3, 9)
    with pytest.raises(ValueError, match=r"6 images of a class.* c1 of the test part has 5\. Lower --shots"):
        Parts(large, large, small).check(3, 6)


# --- digits ---


def digits_of(classes):
    return {int(name.split()[1].rstrip(",")) for name in classes.names}


@pytest.mark.parametrize("seed", range(12))
def test_no_digit_of_a_test_task_is_in_training_or_validation(seed):
    parts = few_shot.digit_parts(seed)
    digits = [digits_of(part) for part in parts]
    assert [len(some) for some in digits] == [4, 3, 3]
    assert set().union(*digits) == set(range(10))
    assert sum(len(part.names) for part in parts) == 30
    parts.check(5, 16)


def test_the_classes_of_a_digit_are_its_images_turned_and_mirrored():
    inputs, target = load("digits")
    parts = few_shot.digit_parts(0)
    found = {name: (part, k) for part in parts for k, name in enumerate(part.names)}
    original = 2.5 * (inputs[target == 4] - 0.3)
    expected = {
        "digit 4": lambda image: image,
        "digit 4, turned by 90": np.rot90,
        "digit 4, mirrored": np.fliplr,
        "digit 4, mirrored, turned by 90": lambda image: np.rot90(np.fliplr(image)),
    }
    assert {name for name in found if name.startswith("digit 4")} == set(expected)
    assert {name for name in found if name.startswith("digit 8")} == {"digit 8", "digit 8, turned by 90"}
    for name, change in expected.items():
        part, k = found[name]
        assert part.counts[k] == len(original)
        for row, image in zip(part.images[k], original, strict=False):
            assert np.array_equal(row.view(8, 8).numpy(), change(image.reshape(8, 8)).astype(np.float32))


def test_the_nearest_neighbour_in_pixels_is_right_on_84_percent_of_the_test_images():
    right = []
    for seed in range(12):
        tasks = maml.FewShot().drawer(seed)(meta.TEST, 100)
        nearest = torch.cdist(tasks.x_query, tasks.x).argmin(-1)
        labels = tasks.y.argmax(-1).gather(1, nearest)
        right.append((labels == tasks.y_query.argmax(-1)).double().mean())
    assert round(100 * float(torch.stack(right).mean())) == 84
    assert "84% right" in maml.__doc__


# --- adaptation ---


class Dense(nn.Sequential):
    def __init__(self, parameters):
        super().__init__(nn.Linear(64, maml.HIDDEN), nn.ReLU(), nn.Linear(maml.HIDDEN, 5))
        for own, value in zip(self.parameters(), parameters, strict=True):
            own.data = value.T.squeeze(-1).clone()


class Blocks(nn.Sequential):
    def __init__(self, parameters, filters):
        channels = [parameters[0].shape[1], filters, filters, filters]
        layers = []
        for c in channels:
            layers += [nn.Conv2d(c, filters, 3, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(filters, track_running_stats=False), nn.ReLU(), nn.MaxPool2d(2)]
        super().__init__(*layers, nn.Flatten(), nn.Linear(*parameters[-2].shape))
        *blocks, weight, bias = parameters
        values = [value.squeeze() if k % 3 else value for k, value in enumerate(blocks)]
        for own, value in zip(self.parameters(), [*values, weight.T, bias[0]], strict=True):
            own.data = value.clone()


def few_images(side=28, channels=1):
    """A part of each kind with random images."""
    images = [torch.rand(6, channels, side, side, generator=generator(c)) for c in range(5)]
    part = Classes.of(images, [f"c{c}" for c in range(5)])
    return lambda seed: Parts(part, part, part)


def convolutional(**changes):
    options = {"channels": 1, "side": 28, "filters": 3, "queries": 2, "measured": 2, "size": "test"}
    return maml.FewShot(parts=few_images(), **(options | changes))


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("kind", ["dense", "convolutional"])
def test_the_inner_steps_are_those_of_sgd(kind, steps):
    problem = maml.FewShot(inner_steps=steps) if kind == "dense" else convolutional(inner_steps=steps)
    task = Tasks(*(values[0].double() for values in problem.drawer(0)(meta.TRAIN, 1)))
    parameters = [p[0].double() for p in problem.initial([0], 1)]
    network = Dense(parameters) if kind == "dense" else Blocks(parameters, 3)
    optimizer = torch.optim.SGD(network.parameters(), lr=problem.inner_rate)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(task.x), task.y.argmax(-1)).backward()
        optimizer.step()
    expected = network(task.x_query)
    moved = meta.adapted(problem, parameters, task)
    outputs = problem.outputs(moved, task.x_query)
    # Sums of some thousand terms, four layers, a few steps.
    assert torch.allclose(outputs, expected, rtol=1e5 * EPS, atol=1e5 * EPS)
    assert (outputs - problem.outputs(parameters, task.x_query)).abs().max() > 0.01
    scores = problem.scores(outputs, task.y_query)
    right = (expected.argmax(-1) == task.y_query.argmax(-1)).double().mean()
    assert scores["accuracy"] == pytest.approx(right.item(), rel=4 * float(torch.finfo(torch.float32).eps))
    loss = nn.functional.cross_entropy(expected, task.y_query.argmax(-1))
    assert scores["loss"].item() == pytest.approx(loss.item(), rel=1e5 * EPS)


@pytest.mark.usefixtures("_double")
def test_the_gradient_goes_through_the_inner_step_unless_it_is_of_first_order():
    problem = maml.Sinusoids(inner_rate=0.1)
    tasks = Tasks(*(values[None].double() for values in problem.drawer(0)(meta.TRAIN, 2)))
    parameters = [p.double().requires_grad_() for p in problem.initial([0], 1)]

    def loss(of):
        return meta.task_scores(of, parameters, tasks)["loss"].sum()

    gradients = torch.autograd.grad(loss(problem), parameters)
    direction = [torch.randn(p.shape, generator=generator(k)) for k, p in enumerate(parameters)]
    along = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True)).item()
    step, ends = 1e-6, []
    for sign in (1, -1):
        moved = [(p + sign * step * d).detach() for p, d in zip(parameters, direction, strict=True)]
        ends.append(meta.task_scores(problem, moved, tasks)["loss"].sum().item())
    # A central difference: rounding of a loss of some tens over the step; ReLU has no curvature of its own.
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(along, rel=1e-5)

    first = torch.autograd.grad(loss(dataclasses.replace(problem, first_order=True)), parameters)
    of_moved = [torch.zeros_like(p[0]) for p in parameters]
    for t in range(2):
        task = Tasks(*(values[0, t] for values in tasks))
        moved = [p.detach().requires_grad_() for p in meta.adapted(problem, [p[0] for p in parameters], task)]
        query = problem.scores(problem.outputs(moved, task.x_query), task.y_query)["loss"]
        of_moved = [a + b for a, b in zip(of_moved, torch.autograd.grad(query, moved), strict=True)]
    for got, expected, whole in zip(first, of_moved, gradients, strict=True):
        assert torch.allclose(got[0], expected, rtol=1e4 * EPS, atol=1e4 * EPS)
        assert not torch.allclose(got, whole, rtol=1e-3)


# --- meta-training ---


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize("weighting", [None, rgd.KL(3.0), rgd.CVaR(0.25)])
def test_a_meta_step_is_adam_on_the_weighted_losses_of_the_tasks(weighting):
    cell, steps = Cell(0.01, 0.1), 3
    problem = maml.Sinusoids(steps=steps, tasks=8, validation=4, test=10)
    (outcome,) = meta.meta_train(problem, Arm("arm", weighting), [5], [cell])[5, cell]

    draw = problem.drawer(5)
    draw(meta.VALIDATION, 4)
    test = draw(meta.TEST, 10)
    parameters = [p.requires_grad_() for p in problem.initial([5], 1)]
    optimizer = torch.optim.Adam(parameters, lr=cell.learning_rate, weight_decay=cell.weight_decay)
    means = []

    def losses(tasks):
        return meta.task_scores(problem, parameters, Tasks(*(values[None] for values in tasks)))["loss"][0]

    for step in range(steps):
        optimizer.param_groups[0]["lr"] = cell.learning_rate * (1 + math.cos(math.pi * step / steps)) / 2
        of_tasks = losses(draw(meta.TRAIN, 8))
        weights = np.ones(8)
        if isinstance(weighting, rgd.KL):
            weights = np.exp(np.minimum(of_tasks.detach().numpy(), 3) / 4)
        elif weighting is not None:
            weights = np.where(of_tasks.detach().numpy().argsort().argsort() >= 6, 4.0, 0.0)
        means.append(weights.mean())
        optimizer.zero_grad()
        (torch.tensor(weights) * of_tasks).mean().backward()
        optimizer.step()
    # Adam divides by the root of a square: some digits are lost where gradients are small.
    assert outcome.test["mean_loss"] == pytest.approx(losses(test).mean().item(), rel=1e-9)
    assert outcome.test["worst_tenth"] == pytest.approx(losses(test).max().item(), rel=1e-9)
    assert outcome.mean_weight == pytest.approx(np.mean(means), rel=1e-9)


def test_models_that_train_at_once_do_not_touch_each_other():
    problem = maml.FewShot(steps=3, validation=4, test=10)
    cells = [Cell(0.003, 0.0), Cell(0.01, 0.1)]
    together = meta.meta_train(problem, Arm("rgd", rgd.KL(3.0)), [0, 1], cells)
    (alone,) = meta.meta_train(problem, Arm("rgd", rgd.KL(3.0)), [1], cells[1:])[1, cells[1]]
    # Three steps of Adam in float32, where a batched product may add in another order.
    eps = 1e4 * torch.finfo(torch.float32).eps
    for metric, value in alone.test.items():
        assert together[1, cells[1]][0].test[metric] == pytest.approx(value, eps), metric
    assert together[0, cells[1]][0].test != together[1, cells[1]][0].test
    assert set(alone.test) == set(maml.METRICS)


def test_digits_are_learnt():
    problem = maml.FewShot(steps=20, validation=1, test=20)
    learnt, nothing = Cell(0.003, 0.01), Cell(0.0, 0.0)
    outcomes = meta.meta_train(problem, Arm("plain"), [0, 1], [learnt, nothing])
    for seed in (0, 1):
        after, before = (outcomes[seed, cell][0].test for cell in (learnt, nothing))
        assert after["mean_loss"] < before["mean_loss"] < math.log(5)
        assert after["accuracy"] > 0.4, "twice as good as a guess"


def test_the_worst_tenth_takes_the_largest_losses_and_the_smallest_accuracies():
    accuracies = torch.tensor([[k / 20 for k in range(20)]])

    class Given(maml.FewShot):
        def scores(self, outputs, y):
            return {"loss": 1 - outputs.mean(), "accuracy": outputs.mean()}

        def outputs(self, parameters, x):
            return x + 0 * parameters[0].sum()

    tasks = Tasks(*(accuracies[..., None] for _ in range(4)))
    found = meta.measure(Given(), [torch.zeros(1, 1)], tasks)
    assert found["worst_tenth_accuracy"] == pytest.approx([0.025])
    assert found["worst_tenth"] == pytest.approx([0.975])
    assert found["accuracy"] == pytest.approx([0.475])


def test_a_network_that_diverged_has_no_accuracy():
    scores = maml.FewShot().scores(torch.full((5, 5), torch.nan), torch.eye(5))
    assert scores["accuracy"].isnan()


def test_each_network_is_kept_when_it_is_done(tmp_path):
    path, trained = tmp_path / "runs.jsonl", []

    def train(problem, arm, seeds, cells, snapshots):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append((*seeds, *cells))
        return {(seeds[0], cells[0]): [Outcome({}, {}, 1.0, 1.0)]}

    def run(store):
        return run_cells(problem, arm, [0, 1], cells, store, (), train, None, one_by_one=True)

    cells = [Cell(0.1, 0.0), Cell(0.2, 0.0)]
    problem, arm = maml.FewShot(), Arm("plain")
    with pytest.raises(KeyboardInterrupt):
        run(Store(path))
    assert len(path.read_text().splitlines()) == 2
    first, trained = trained, []
    run(Store(path))
    assert first + trained == [(seed, cell) for seed in (0, 1) for cell in cells]
    keys = [json.loads(line)[0] for line in path.read_text().splitlines()]
    assert len(keys) == len(set(keys)) == 4, "no run is written twice"


# --- folders ---


def write_images(folder, classes, shape, suffix, count=4):
    """A bright or dark spot in another place for every class, noise around it."""
    random = np.random.default_rng(0)
    for k, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for j in range(count):
            pixels = random.integers(0, 256, shape, dtype=np.uint8)
            pixels[10 * k : 10 * k + 25, :25] = 0
            image = Image.fromarray(pixels)
            (image if len(shape) == 3 else image.convert("1")).save(
                folder / name / f"{k:04}_{j + 1:02}{suffix}"
            )


@pytest.fixture(scope="module")
def omniglot(tmp_path_factory):
    folder = tmp_path_factory.mktemp("omniglot")
    background = [f"{a}/character{k:02}" for a in ("Greek", "Latin") for k in (1, 2, 3, 4)]
    write_images(folder / "images_background", background, (105, 105), ".png")
    evaluation = ["Tengwar/character01", "Tengwar/character02"]
    write_images(folder / "images_evaluation", evaluation, (105, 105), ".png")
    return folder


@pytest.fixture(scope="module")
def mini_imagenet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mini-imagenet")
    for part, first in (("train", 0), ("val", 10), ("test", 20)):
        names = [f"n{first + k:08}" for k in range(5)]
        write_images(folder / part, names, (84, 84, 3), ".jpg")
    return folder


def test_characters_of_omniglot_are_in_one_part_with_all_their_turns(omniglot):
    parts = few_shot.omniglot(omniglot)
    train, validation, test = parts(0)
    assert [len(part.names) for part in (train, validation, test)] == [24, 8, 8]
    characters = [{name.split(",")[0] for name in part.names} for part in (train, validation, test)]
    assert [len(some) for some in characters] == [6, 2, 2]
    assert len(set().union(*characters)) == 10
    assert characters[2] == {"Tengwar/character01", "Tengwar/character02"}
    assert set(parts(1).validation.names) != set(validation.names)
    assert train.images.shape == (24, 4, 1, 28, 28)
    for k in range(4):
        turned = torch.rot90(train.images[:6], k, (-2, -1))
        assert torch.equal(train.images[6 * k : 6 * k + 6], turned)
    # The black spot of the file is ink.
    assert test.names[0] == "Tengwar/character01"
    assert test.images[0, :, 0, 1:5, 1:5].min() > 200
    assert test.images[0, :, 0, 10:, 10:].float().mean() < 160


def test_the_parts_of_mini_imagenet_are_its_folders(mini_imagenet):
    parts = few_shot.mini_imagenet(mini_imagenet)(7)
    assert [part.names[0] for part in parts] == ["n00000000", "n00000010", "n00000020"]
    assert parts.train.images.shape == (5, 4, 3, 84, 84)
    with Image.open(mini_imagenet / "val" / "n00000011" / "0001_03.jpg") as image:
        assert torch.equal(parts.validation.images[1, 2].movedim(0, -1), torch.from_numpy(np.array(image)))


def test_images_of_another_size_are_scaled(tmp_path):
    for part in ("train", "val", "test"):
        write_images(tmp_path / part, ["n1"], (60, 90, 3), ".JPEG", count=1)
    assert few_shot.mini_imagenet(tmp_path)(0).train.images.shape == (1, 1, 3, 84, 84)


def test_a_missing_folder_and_one_without_images_are_named_with_the_layout(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"images_background is missing: --omniglot takes a folder"):
        few_shot.omniglot(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(
        FileNotFoundError, match=r"train holds no images .*: --mini-imagenet takes .*train/\*/"
    ):
        few_shot.mini_imagenet(tmp_path)


# --- from end to end ---


@pytest.mark.parametrize("kind", ["omniglot", "mini-imagenet"])
def test_a_folder_is_learnt_from_end_to_end(kind, request, tmp_path, capsys):
    folder = request.getfixturevalue(kind.replace("-", "_"))
    options = ["--ways", "4", "--shots", "2", "--output", str(tmp_path)]
    options += ["--first-order"] if kind == "mini-imagenet" else []
    table = maml.command_line(["--quick", f"--{kind}", str(folder), *options])
    (setting,) = table.settings()
    assert setting == {"omniglot": "Omniglot", "mini-imagenet": "mini-ImageNet"}[kind] + ", 4 ways, 2 shots"
    assert table.arms(setting) == [maml.PLAIN, maml.RGD, f"plain x mean weight of {maml.RGD}"]
    assert all(math.isfinite(line.mean) for line in table.lines)
    assert {line.metric for line in table.lines} == set(maml.METRICS)
    assert (tmp_path / "maml.png").exists()
    first_order = " --first-order" if kind == "mini-imagenet" else ""
    command = f"maml.py --quick --{kind} {folder.name} --ways 4 --shots 2{first_order}"
    assert table.header["command"] == f"python examples/evidence/{command}"
    assert f"{setting}: accuracy on test tasks" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ways", "0", "--omniglot", "x"], "a whole number from 1 on is needed, got '0'"),
        (["--omniglot", "x", "--mini-imagenet", "y"], "not allowed with"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message, capsys):
    with pytest.raises(SystemExit):
        maml.command_line(["--quick", *options])
    assert message in capsys.readouterr().err


def test_options_of_folders_are_refused_without_a_folder():
    with pytest.raises(SystemExit, match=r"--shots.* go with --omniglot or --mini-imagenet"):
        maml.command_line(["--quick", "--shots", "5"])


def test_the_settings_are_those_of_finn_et_al(omniglot, mini_imagenet):
    def settings(name, folder, ways):
        problem = maml.images(name, folder, maml.Options(ways), quick=True)
        return problem.inner_rate, problem.inner_steps

    assert settings("omniglot", omniglot, 5) == (0.4, 1)
    assert settings("omniglot", omniglot, 8) == (0.1, 5)
    assert settings("mini-imagenet", mini_imagenet, 5) == (0.01, 5)
