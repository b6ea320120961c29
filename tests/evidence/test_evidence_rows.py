"""The grid, the lineup of arms and the evidence program on images do as they say."""

import dataclasses
import importlib
import pathlib
import sys

import numpy as np
import pytest
import rgd
import torch
from rgd.torch import sample_weights

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples" / "evidence"))

from harness import Arm, Cell, Grid, lineup
from harness.results import Table
from harness.sweep import Choice, Chosen
from harness.train import Outcome

tabular, trees, vit = map(importlib.import_module, ("tabular", "trees", "vit"))


# --- the grid ---


def test_a_grid_of_one_axis_holds_the_decay():
    grid = Grid((0.1, 0.2), (0.01,), one_axis=True)
    assert grid.grown(Cell(0.2, 0.01)).cells() == [Cell(0.1, 0.01), Cell(0.2, 0.01), Cell(0.4, 0.01)]
    assert "not tuned" in str(grid)


# --- the arms around RGD ---


def test_every_arm_of_a_lineup_meets_plain_training_of_its_budget():
    asked = []

    def best(arm):
        asked.append(arm)
        score = {"RGD, tau 3": 0.9}.get(arm.name, 0.5 + 0.1 * arm.start)
        outcome = Outcome({"accuracy": score}, {"accuracy": score}, 1.5, 0.0)
        return Chosen("p", arm, (0,), (Choice(Cell(0.1, 0.0), score, ""),), ((outcome,),))

    results = lineup.lineup("here", best, (1.0, 3.0), "accuracy", [*lineup.CONTROLS])
    assert [(r.chosen.arm.name, r.baseline) for r in results] == [
        ("cross-entropy", ""),
        ("cross-entropy, as many runs", ""),
        ("RGD, tau 1", "cross-entropy"),
        ("RGD, tau 3", "cross-entropy"),
        ("RGD, tuned tau", "cross-entropy, as many runs"),
        ("RGD, mean one", "cross-entropy"),
        ("plain x mean weight of RGD", "cross-entropy"),
        ("RGD, opposite sign", "cross-entropy"),
    ]
    assert [arm.start for arm in asked] == [0, 1, 0, 0, 0, 0, 0]
    assert len(asked) == lineup.sweeps((1.0, 3.0), [*lineup.CONTROLS])
    tests = {r.chosen.arm.name: r.chosen.test("accuracy")[0] for r in results}
    # Of two starts validation chose the second, and of two tau the larger.
    assert (tests["cross-entropy"], tests["cross-entropy, as many runs"]) == (0.5, 0.6)
    assert tests["RGD, tuned tau"] == 0.9
    losses = torch.tensor([0.5, 2.0], dtype=torch.float64)
    weights = [arm.weighting and sample_weights(losses, arm.weighting) for arm in asked]
    rgd_1 = np.exp([0.25, 0.5])
    expected = [
        None, None, rgd_1, np.exp([0.125, 0.5]), rgd_1 / rgd_1.mean(), [1.5, 1.5], 1 / rgd_1,
    ]  # fmt: skip
    for got, want in zip(weights, expected, strict=True):
        assert (got is None) == (want is None)
        assert got is None or got.tolist() == pytest.approx(list(want), rel=1e-14)


def test_a_lineup_is_told_by_its_first_and_last_tau_and_its_controls():
    rng = np.random.default_rng(0)

    def best(arm):
        values = rng.uniform(size=(12, 3))
        outcomes = tuple((Outcome({}, dict(zip(metrics, v, strict=True)), 1.0, 0.0),) for v in values)
        choice = Choice(Cell(0.1, 0.0), float(arm.name == "RGD, tau 2"), "")
        return Chosen("p", arm, tuple(range(12)), (choice,) * 12, outcomes)

    metrics = ["accuracy", "mean_loss", "worst_tenth"]
    results = lineup.lineup("here", best, (1.0, 2.0, 3.0), "accuracy", [lineup.CONTROL, lineup.OPPOSITE])
    table = Table.of({}, metrics, results)
    tail = {arm: table.line("here", arm, "worst_tenth").shown() for arm in table.arms("here")}
    right = {arm: table.line("here", arm, "accuracy").points() for arm in table.arms("here")}
    times, opposite = "plain x mean weight of RGD", "RGD, opposite sign"
    assert lineup.said(table, "here", {"accuracy": "right", "worst_tenth": "tail"}) == (
        f"RGD, tau 1: right {right['RGD, tau 1']}, tail {tail['RGD, tau 1']}; "
        f"RGD, tau 3: right {right['RGD, tau 3']}, tail {tail['RGD, tau 3']}; "
        f"tuned tau, against as many runs: right {right['RGD, tuned tau']}; "
        f"controls of RGD, tau 1: x mean weight {right[times]}, opposite sign {right[opposite]}"
    )
    assert [*lineup.labels(table)][:4] == ["RGD, tau 1", "RGD, tau 2", "RGD, tau 3", "RGD, tuned tau"]


# --- images ---


@pytest.fixture(scope="module")
def images():
    base = vit.digits(epochs=1, sizes=(96, 30))
    return vit.Mixed("small", base.draw, base.features, base.outputs, epochs=1, batch_size=32)


def test_models_that_train_at_once_do_not_touch_each_other(images):
    cells = [Cell(0.01, 0.05), Cell(0.02, 0.0)]
    together = vit.train(images, Arm("plain"), [0, 1], cells, ())
    alone = vit.train(images, Arm("plain"), [1], cells[1:], ())
    # Three steps of AdamW in float32, where a batched product may add in another order.
    eps = 1e4 * torch.finfo(torch.float32).eps
    assert together[1, cells[1]][0].test["mean_loss"] == pytest.approx(
        alone[1, cells[1]][0].test["mean_loss"], eps
    )
    assert together[0, cells[1]][0].test["mean_loss"] != together[1, cells[1]][0].test["mean_loss"]


def test_without_mixup_images_are_trained_as_they_are(images):
    plain = dataclasses.replace(images, mixup=0.0)
    assert plain.key() != images.key()
    assert plain.shares(0, 3).tolist() == [1, 1, 1]
    mixed = images.shares(0, 1000)
    # The shares of Beta(0.2, 0.2): mean 1/2, variance 1/(4 (2 a + 1)); six standard errors.
    variance = 1 / (4 * (2 * vit.MIXUP + 1))
    assert mixed.mean() == pytest.approx(0.5, abs=6 * np.sqrt(variance / 1000))
    assert mixed.var() == pytest.approx(variance, rel=0.2)
    losses = [
        vit.train(p, Arm("plain"), [0], [Cell(0.01, 0.0)], ())[0, Cell(0.01, 0.0)][0].test["mean_loss"]
        for p in (plain, images)
    ]
    assert losses[0] != losses[1]


def test_a_forward_pass_in_bfloat16_gives_nearly_the_same(images):
    cell = Cell(0.01, 0.0)
    half, full = (
        vit.train(p, Arm("plain"), [0], [cell], ())[0, cell][0].test["mean_loss"]
        for p in (dataclasses.replace(images, bf16=True), images)
    )
    assert half != full
    # Early on the logits are about 1, and so is what rounding them to 8 bits changes of the loss, in 1/128.
    assert half == pytest.approx(full, rel=torch.finfo(torch.bfloat16).eps)


def test_weights_see_the_mixed_losses(images):
    cell = Cell(0.01, 0.05)
    one, three = (
        vit.train(images, Arm("rgd", rgd.KL(tau)), [0], [cell], ())[0, cell][0] for tau in (1.0, 3.0)
    )
    # The first losses are near log 10 = 2.3: above tau = 1, whose weight is exp(1/2), and below tau = 3.
    assert one.mean_weight == pytest.approx(np.exp(0.5), rel=0.02)
    assert 1.5 < three.mean_weight < np.exp(0.75)


def test_patches_hold_the_pixels_of_a_square():
    network, seen = vit.ViT(), []
    network.embed.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    network(torch.arange(64.0).view(1, 64))
    assert seen[0][0, 0].tolist() == [0, 1, 8, 9]
    assert seen[0][0, 5].tolist() == [18, 19, 26, 27]
