"""The evidence harness keeps the rules it promises, and what is committed follows from the runs."""

import dataclasses
import functools
import importlib
import itertools
import math
import pathlib
import re
import sys

import numpy as np
import pytest
import rgd
import torch
from PIL import Image
from rgd.torch import RGDLoss, sample_weights
from scipy import stats
from torch import nn

FOLDER = pathlib.Path(__file__).parents[2] / "examples" / "evidence"
sys.path.insert(0, str(FOLDER))

import harness  # noqa: E402
import harness.losses  # noqa: E402
from harness import Arm, Cell, Grid, Store, statistics  # noqa: E402
from harness.problems import Classification, Data, Part  # noqa: E402
from harness.results import RUN_COLUMNS, Result, Table  # noqa: E402
from harness.train import Outcome  # noqa: E402

# The package exports functions of the same names.
train_module, sweep_module = sys.modules["harness.train"], sys.modules["harness.sweep"]
readme = importlib.import_module("readme")
ROWS = {row.name: row for row in readme.rows()}
read = functools.cache(lambda name: Table.read(ROWS[name].path))
COMMITTED = {name: row for name, row in ROWS.items() if row.path.exists()}
pytestmark = pytest.mark.usefixtures("one_thread")


def doubles(seed, samples=(40, 20, 20)):
    """Three parts of random float64 data of 6 columns and 3 classes."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for n in samples:
        inputs = torch.randn(n, 6, generator=generator, dtype=torch.float64)
        target = torch.randint(3, (n,), generator=generator)
        parts.append(Part(inputs, target, torch.zeros(n, dtype=torch.int64)))
    return Data(*parts)


@pytest.fixture
def small():
    """A problem that trains in milliseconds, in float64."""
    torch.set_default_dtype(torch.float64)
    yield Classification("small", doubles, 6, 3, hidden=(5,), epochs=4, batch_size=8)
    torch.set_default_dtype(torch.float32)


def pretend(score, *others):
    """Trains nothing: `score(rate, decay)` is the accuracy on validation data, its opposite on test data.

    With several scores, seed k has the k-th.
    """

    def trainer(problem, arm, seeds, cells, snapshots):
        trainer.trained += [(seed, cell) for seed in seeds for cell in cells]
        scores = (score, *others)
        return {
            (seed, cell): [
                Outcome({"accuracy": value}, {"accuracy": -value}, 1.0, 0.0)
                for value in [scores[seed % len(scores)](*cell)]
            ]
            for seed in seeds
            for cell in cells
        }

    trainer.trained = []
    return trainer


def peak(rate, decay):
    """A score that is best at `rate` and `decay`, for a logarithmic grid."""
    return lambda r, d: -abs(math.log(r / rate)) - abs(math.log((d + 1e-6) / (decay + 1e-6)))


PRETENDED = Classification("pretended", doubles, 6, 3)


def sweep(trainer, store=None, **options):
    options = {"grid": Grid(), "seeds": 3, "store": store or Store()} | options
    return harness.sweep(PRETENDED, Arm("arm"), trainer=trainer, **options)


# --- the sweep ---


CELLS = len(Grid().cells())


def test_the_best_cell_inside_the_grid_is_taken_as_it_is():
    trainer = pretend(peak(0.1, 0.004))
    chosen = sweep(trainer)
    assert [choice.cell for choice in chosen.choices] == [Cell(0.1, 0.004)] * 3
    assert len(trainer.trained) == 3 * CELLS


def test_each_seed_chooses_by_its_own_validation_data():
    bests = [(0.1, 0.004), (0.2, 0.0), (0.1, 0.001)]
    chosen = sweep(pretend(*(peak(*best) for best in bests)))
    assert [choice.cell for choice in chosen.choices] == [Cell(*best) for best in bests]
    # What a seed reached is that of its own cell, not of another's.
    scores = [choice.score for choice in chosen.choices]
    assert chosen.test("accuracy").tolist() == [-score for score in scores]
    alone = sweep(pretend(peak(*bests[0])), seeds=1)
    assert alone.choices == chosen.choices[:1]


def test_only_the_seeds_whose_best_cell_is_at_the_edge_train_more():
    trainer = pretend(peak(0.1, 0.004), peak(1.6, 0.004))
    chosen = sweep(trainer, seeds=4)
    assert [choice.cell.learning_rate for choice in chosen.choices] == [0.1, 1.6, 0.1, 1.6]
    decays = len(Grid().weight_decays)
    assert len(trainer.trained) == 4 * CELLS + 2 * 3 * decays
    assert ["widened" in choice.grid for choice in chosen.choices] == [False, True, False, True]


def test_among_equal_cells_the_middle_of_the_plateau_is_taken():
    grid = Grid((0.1, 0.2, 0.4, 0.8, 1.6), (0.0, 0.001, 0.002, 0.004))
    flat = sweep(pretend(lambda r, d: 1.0 if 0.2 <= r <= 0.8 and d <= 0.002 else 0.0), grid=grid)
    assert flat.choices[0].cell.learning_rate == 0.4


def test_early_stopping_chooses_a_snapshot_by_validation_data():
    def trainer(problem, arm, seeds, cells, snapshots):
        assert snapshots == (3, 5)
        rising, falling = (0.1, 0.2, 0.3), (0.2, 0.5, 0.1)
        return {
            (seed, cell): [
                Outcome({"accuracy": value + peak(0.1, 0.001)(*cell)}, {"accuracy": step}, 1.0, 0.0)
                for step, value in enumerate(rising if seed else falling)
            ]
            for seed in seeds
            for cell in cells
        }

    chosen = sweep(trainer, seeds=2, snapshots=(3, 5), stop_early=True)
    assert chosen.test("accuracy").tolist() == [1, 2]
    last = sweep(trainer, seeds=2, snapshots=(3, 5))
    assert last.test("accuracy").tolist() == [2, 2]


def test_a_smoke_test_takes_the_best_cell_where_it_lies():
    trainer = pretend(peak(1.6, 0.001))
    chosen = sweep(trainer, edges=True)
    assert chosen.choices[0].cell == Cell(0.4, 0.001)
    assert chosen.choices[0].grid.endswith("at an edge")
    assert len(trainer.trained) == 3 * CELLS


@pytest.mark.parametrize(
    ("best", "why"),
    [
        ((1.6, 0.001), "learning rate above the grid"),
        ((0.0125, 0.001), "learning rate below the grid"),
        ((0.1, 0.256), "weight decay above the grid"),
        ((1.6, 0.256), "both above the grid"),
    ],
)
def test_the_grid_grows_until_the_best_cell_is_inside(best, why):
    chosen = sweep(pretend(peak(*best)))
    assert {choice.cell for choice in chosen.choices} == {Cell(*best)}, why
    assert "widened" in chosen.choices[0].grid


def test_no_weight_decay_at_all_counts_as_inside():
    trainer = pretend(peak(0.1, 0.0))
    assert sweep(trainer).choices[0].cell == Cell(0.1, 0.0)
    assert len(trainer.trained) == 3 * CELLS


def test_a_smallest_weight_decay_that_is_not_zero_counts_as_an_edge():
    grid = Grid(weight_decays=(0.001, 0.002, 0.004))
    chosen = sweep(pretend(peak(0.1, 0.001)), grid=grid)
    assert chosen.choices[0].grid.endswith("0.0005 to 0.004, widened 1x")


def test_a_best_cell_that_stays_at_the_edge_is_an_error_that_names_it():
    with pytest.raises(
        harness.EdgeError, match=r"arm on pretended, seed 0: the best cell.* at the edge after 3"
    ):
        sweep(pretend(lambda rate, decay: rate), most_widenings=3)


def test_an_arm_all_of_whose_runs_diverge_is_an_error():
    with pytest.raises(harness.EdgeError, match="diverged"):
        sweep(pretend(lambda rate, decay: math.nan))


def test_a_cell_in_which_a_seed_diverged_is_not_chosen_by_it():
    score = peak(0.2, 0.0)
    chosen = sweep(pretend(lambda r, d: math.nan if r == 0.2 else score(r, d), score), seeds=2)
    assert chosen.choices[0].cell.learning_rate != 0.2
    assert chosen.choices[1].cell == Cell(0.2, 0.0)


def test_only_new_cells_are_trained_when_the_grid_grows():
    trainer = pretend(peak(1.6, 0.001))
    sweep(trainer)
    assert len(trainer.trained) == len(set(trainer.trained)) == 3 * 7 * len(Grid().weight_decays)


def test_an_equal_budget_is_that_of_other_starts_on_the_same_splits(small):
    plain = Arm("plain")
    assert plain.key() != plain.started(1).key()
    cell = Cell(0.1, 0.0)
    first, second = (
        harness.train(small, arm, (0,), [cell])[0, cell][-1] for arm in (plain, plain.started(1))
    )
    assert first.test != second.test
    # It is the network and the order of batches of another seed, on the data of this one.
    other = dataclasses.replace(small, draw=lambda seed: small.draw(0))
    alone = harness.train(other, plain, (plain.started(1).seed(0),), [cell])
    assert alone[plain.started(1).seed(0), cell][-1].test == pytest.approx(second.test, rel=1e-12)


def test_a_tuned_arm_takes_each_seeds_best_by_validation_whatever_the_test_says():
    low, high = peak(0.1, 0.001), lambda r, d: 0.5 + peak(0.1, 0.001)(r, d)
    first, second = sweep(pretend(low, high), seeds=2), sweep(pretend(high, low), seeds=2).renamed("second")
    best = harness.tuned("tuned", [first, second], "accuracy")
    assert best.arm.name == "tuned"
    assert [choice.score for choice in best.choices] == [first.choices[1].score] * 2
    assert best.test("accuracy").tolist() == [second.test("accuracy")[0], first.test("accuracy")[1]]
    assert best.choices[0].grid.startswith("second: ")
    # A loss is the better the smaller it is.
    worst = harness.tuned("tuned", [first, second], "mean_loss")
    assert [choice.score for choice in worst.choices] == [first.choices[0].score] * 2


def test_a_loss_is_chosen_by_its_smallest_value():
    assert harness.problems.higher_is_better("worst_class_accuracy")
    assert not harness.problems.higher_is_better("mean_loss")
    runs = {Cell(0.1, 0.0): [Outcome({"mean_loss": 2.0}, {}, 1.0, 0.0)]}
    assert sweep_module.scored(runs, "mean_loss", -1, False) == ({Cell(0.1, 0.0): -2}, {Cell(0.1, 0.0): -1})


def test_an_arm_that_nothing_tuned_is_marked(small):
    chosen = harness.untuned(small, Arm("plain"), Cell(0.1, 0.0), seeds=2, store=Store())
    assert {choice.grid for choice in chosen.choices} == {"NOT TUNED"}
    assert all(math.isnan(choice.score) for choice in chosen.choices)


def test_runs_at_cells_chosen_before_are_those_of_each_seed(small):
    cells = [Cell(0.1, 0.0), Cell(0.3, 0.01), Cell(0.1, 0.0)]
    chosen = harness.retrained(small, Arm("plain"), cells, store=Store())
    assert [choice.cell for choice in chosen.choices] == cells
    for seed, cell in enumerate(cells):
        alone = harness.train(small, Arm("plain"), (seed,), [cell])[seed, cell][-1]
        assert chosen.outcomes[seed][-1].test == pytest.approx(alone.test, rel=1e-12)


def test_logit_adjustment_and_balanced_softmax_are_one_loss():
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
    target = torch.randint(3, (2, 5), generator=generator)
    counts = torch.tensor([[100.0, 10.0, 1.0], [3.0, 3.0, 3.0]], dtype=torch.float64)
    adjusted, softmax = (
        loss(outputs, target, counts)
        for loss in (harness.losses.logit_adjusted, harness.losses.balanced_softmax)
    )
    # Some ten additions of numbers below 10.
    assert torch.allclose(adjusted, softmax, rtol=0, atol=100 * torch.finfo(torch.float64).eps)
    plain = harness.losses.cross_entropy(outputs, target)
    assert torch.allclose(adjusted[1], plain[1], rtol=1e-14)
    assert not torch.allclose(adjusted[0], plain[0])


def test_class_weights_sum_to_the_classes_and_fall_with_the_count():
    counts = torch.tensor([[100.0, 10.0, 1.0]], dtype=torch.float64)
    for weights in (harness.losses.class_balanced(counts), harness.losses.inverse_frequency(counts)):
        assert weights.sum().item() == pytest.approx(3)
        assert (weights.diff() > 0).all()
    assert torch.allclose(
        harness.losses.inverse_frequency(counts) * counts, torch.full((1, 3), 3 / 1.11).double()
    )


# --- finished runs ---


def test_finished_runs_are_not_trained_again(tmp_path):
    path = tmp_path / "runs.jsonl"
    first = sweep(pretend(peak(0.1, 0.001)), Store(path))
    trainer = pretend(peak(0.1, 0.001))
    second = sweep(trainer, Store(path))
    assert trainer.trained == []
    assert first == second


def test_a_run_that_was_being_written_when_the_program_stopped_is_trained_again(tmp_path):
    path = tmp_path / "runs.jsonl"
    sweep(pretend(peak(0.1, 0.001)), Store(path))
    path.write_text(path.read_text()[:-20])
    trainer = pretend(peak(0.1, 0.001))
    sweep(trainer, Store(path))
    assert len({cell for _, cell in trainer.trained}) == 1


def test_another_weighting_loss_or_problem_is_another_run():
    store, cell = Store(), Cell(0.1, 0.0)
    problems = [PRETENDED, Classification("pretended", doubles, 6, 3, epochs=2)]
    arms = [Arm("a"), Arm("a", rgd.KL(1.0)), Arm("a", rgd.KL(2.0)), Arm("a", cosine=True)]
    arms += [Arm("a", loss=harness.losses.focal), Arm("a", class_weights=harness.losses.class_balanced)]
    arms += [Arm("a", loss=harness.losses.Smoothed(0.2)), Arm("a", loss=harness.losses.Smoothed(0.5))]
    arms += [Arm("a", harness.Ramp(-1.0)), Arm("a", mixup=1.0), Arm("a", balance=True), Arm("a", start=1)]
    keys = {
        store.key(problem, arm, seed, cell, ()) for problem in problems for arm in arms for seed in range(2)
    }
    assert len(keys) == 2 * len(arms) * 2
    assert store.key(PRETENDED, Arm("a"), 0, cell, ()) == store.key(PRETENDED, Arm("b"), 0, cell, ())


def test_changed_code_finds_no_old_runs_and_changed_comments_do(tmp_path):
    program = tmp_path / "program.py"

    def fingerprint(text):
        program.write_text(text)
        return sys.modules["harness.store"].fingerprint(program)

    first = fingerprint('"""What."""\nstep = 1\n')
    assert fingerprint('"""Why."""\n\nstep = 1  # a comment\n') == first
    assert fingerprint('"""What."""\nstep = 2\n') != first


# --- training ---


def alone(problem, arm, seed, cell):
    """The same training with torch.nn, torch.optim and RGDLoss, one network at a time."""
    data = problem.draw(seed)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    start = train_module.initial((6, 5, 3), [seed], 1)
    with torch.no_grad():
        for layer, weight, bias in zip(model[::2], start[::2], start[1::2], strict=True):
            layer.weight.copy_(weight[0].T)
            layer.bias.copy_(bias[0, 0])
    weight = None
    if arm.class_weights is not None:
        weight = arm.class_weights(torch.bincount(data.train.target, minlength=3).double()[None])[0]
    criterion = RGDLoss(weight, weighting=arm.weighting or rgd.ERM())
    optimizer = torch.optim.SGD(model.parameters(), cell.learning_rate, 0.9, weight_decay=cell.weight_decay)
    batches = train_module.orders([seed], len(data.train.target), 8, problem.epochs)[0]
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / len(batches))
    )
    for batch in batches:
        optimizer.zero_grad()
        criterion(model(data.train.inputs[batch]), data.train.target[batch]).backward()
        optimizer.step()
        schedule.step()
    return model


ARMS = [
    Arm("plain"),
    Arm("pointwise", rgd.KL(1.0)),
    Arm("batch", rgd.CVaR(0.3)),
    Arm("class weights", rgd.KL(2.0), class_weights=harness.losses.inverse_frequency),
    Arm("remembers", rgd.MovingAverage(rgd.KL(1.0), 0.9)),
]


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_many_networks_at_once_learn_what_each_learns_alone(small, arm):
    seeds, cells = (3, 7), [Cell(0.3, 0.0), Cell(0.1, 0.01)]
    together = harness.train(small, arm, seeds, cells)
    for seed in seeds:
        for cell in cells:
            data, model = small.draw(seed), alone(small, arm, seed, cell)
            losses = small.losses(model(data.test.inputs), data.test.target)
            # 20 steps in float64: rounding alone may tell the two apart.
            assert together[seed, cell][-1].test["mean_loss"] == pytest.approx(
                losses.mean().item(), rel=1e-10
            )


def test_arms_of_the_same_weights_reach_the_same_to_the_last_digit_whatever_else_is_trained(small):
    cells = [Cell(0.1, 0.0), Cell(0.3, 0.01)]
    plain = harness.train(small, Arm("plain"), (0, 1), cells)
    zero = harness.train(small, Arm("s = 0", rgd.KL(math.inf, scale=0.0)), (1,), cells[1:])
    first, second = plain[1, cells[1]][-1], zero[1, cells[1]][-1]
    assert first.test == pytest.approx(second.test, rel=1e-12)


def test_seeds_differ_in_initial_network_and_order_of_batches():
    first, second = train_module.initial((4, 3), (0, 1), 1)[0]
    assert not torch.equal(first, second)
    first, second = train_module.orders((0, 1), 20, 5, 3)
    assert not torch.equal(first, second)
    assert all(len(set(epoch.flatten().tolist())) == 20 for epoch in first.view(3, 4, 5))


def test_snapshots_measure_on_the_way(small):
    outcomes = harness.train(small, Arm("plain"), (0,), [Cell(0.1, 0.0)], snapshots=(1, 10))
    at_1, at_10, at_the_end = (o.test["mean_loss"] for o in outcomes[0, Cell(0.1, 0.0)])
    assert len({at_1, at_10, at_the_end}) == 3


def test_a_network_that_diverged_has_no_accuracy(small):
    outcome = harness.train(small, Arm("plain"), (0,), [Cell(1e200, 0.1)])[0, Cell(1e200, 0.1)][-1]
    assert math.isnan(outcome.validation["accuracy"])


def test_temperature_scaling_undoes_a_temperature(small):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 4000, 3, generator=generator)
    target = torch.distributions.Categorical(logits=logits[0]).sample()
    part = Part(torch.zeros(4000, 6), target, torch.zeros_like(target))
    spread, fitted = (small.metrics(k * logits, part, (k * logits, part)) for k in (4.0, 1.0))
    assert spread["mean_loss"] > 1.2 * fitted["mean_loss"]
    # Temperatures stand 15% apart, and the loss is flat at its lowest point.
    assert spread["scaled_mean_loss"].item() == pytest.approx(fitted["mean_loss"].item(), rel=0.01)


def test_splits_share_no_row_and_noise_spares_the_test_labels():
    for problem in (harness.digits, harness.breast_cancer):
        clean, noisy = problem(0.0).draw(4), problem(0.4).draw(4)
        rows = [{x.numpy().tobytes() for x in part.inputs} for part in clean]
        assert all(one.isdisjoint(other) for one, other in itertools.combinations(rows, 2))
        for k, share in enumerate((0.4, 0.4, 0.0)):
            assert torch.equal(clean[k].inputs, noisy[k].inputs)
            changed = (clean[k].target != noisy[k].target).double().mean().item()
            assert changed == pytest.approx(share, abs=1 / len(clean[k].target))


# --- controls ---


def test_mean_one_weights_are_the_weights_divided_by_their_mean():
    losses = torch.tensor([0.1, 0.5, 3.0], dtype=torch.float64)
    ours = sample_weights(losses, harness.mean_one(Arm("a", rgd.KL(1.0))).weighting)
    assert torch.allclose(ours, sample_weights(losses, rgd.KL(1.0, normalize=True)), rtol=1e-14)


def test_times_the_mean_weight_is_a_larger_step_and_a_weaker_decay(small):
    control = harness.times_mean_weight(Arm("a", rgd.KL(1.0)), 2.0)
    weighted = harness.train(small, control, (0,), [Cell(0.1, 0.02)])[0, Cell(0.1, 0.02)][-1]
    plain = harness.train(small, Arm("plain"), (0,), [Cell(0.2, 0.01)])[0, Cell(0.2, 0.01)][-1]
    assert weighted.mean_weight == 2
    assert weighted.test == pytest.approx(plain.test, rel=1e-10)


def test_the_opposite_sign_inverts_every_weight():
    losses, arm = torch.tensor([0.1, 0.5, 3.0], dtype=torch.float64), Arm("a", rgd.KL(2.0))
    product = sample_weights(losses, arm.weighting) * sample_weights(
        losses, harness.opposite_sign(arm).weighting
    )
    assert torch.allclose(product, torch.ones(3, dtype=torch.float64), rtol=1e-14)


def test_a_control_of_an_arm_without_weights_is_refused():
    with pytest.raises(ValueError, match="plain has no weighting"):
        harness.mean_one(Arm("plain"))
    with pytest.raises(ValueError, match="KL's scale"):
        harness.opposite_sign(Arm("cvar", rgd.CVaR(0.1)))


# --- statistics ---


def test_differences_are_taken_in_pairs_and_tested_as_scipy_does():
    random = np.random.default_rng(0)
    baseline = random.normal(size=12) * 10
    values = baseline + random.normal(0.5, 1.0, size=12)
    mean, half, p, deviation = statistics.compare(values, baseline)
    expected = stats.ttest_rel(values, baseline)
    low, high = expected.confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((low, high), rel=1e-9)
    assert p == pytest.approx(expected.pvalue, rel=1e-9)
    assert deviation == pytest.approx(np.std(values - baseline, ddof=1), rel=1e-12)
    assert statistics.compare(values, values)[2] == 1
    assert statistics.compare(np.ones(3), np.zeros(3))[2] == 0


def test_holms_correction_is_that_of_his_paper():
    # m = 4: .01 * 4, .03 * 3, .04 * 2 raised to the one before it, .2 * 1.
    adjusted = statistics.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.2})
    assert adjusted == pytest.approx({"a": 0.04, "c": 0.09, "b": 0.09, "d": 0.2})
    assert statistics.holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}


def test_a_detectable_difference_is_missed_by_the_strictest_test_in_two_of_a_hundred():
    level = 0.05 / 15
    assert 0.97 < statistics.power(statistics.DETECTABLE, 12, level) < 0.99
    random = np.random.default_rng(0)
    p = stats.ttest_1samp(random.normal(statistics.DETECTABLE, 1, (20_000, 12)), 0, axis=1).pvalue
    # A share of 20,000 draws has a standard error of 0.001.
    assert (p < level).mean() == pytest.approx(statistics.power(statistics.DETECTABLE, 12, level), abs=0.005)


@pytest.mark.parametrize("pairs", [12, 16, 24, 40])
def test_more_pairs_detect_smaller_differences_as_surely(pairs):
    level = statistics.STRICTEST
    found = statistics.power(statistics.detectable(pairs), pairs, level)
    assert found == pytest.approx(statistics.power(statistics.DETECTABLE, 12, level), abs=1e-6)
    assert (statistics.detectable(pairs) < statistics.DETECTABLE) == (pairs > 12)
    assert statistics.detectable(11) == math.inf


def test_choices_of_each_seed_keep_the_interval_where_one_choice_for_all_breaks_it():
    random, pairs = np.random.default_rng(0), 80
    grid = Grid((0.1, 0.2, 0.4), (0.0, 0.001, 0.002, 0.004))
    cells = grid.cells()

    def arm(worth):
        """Validation cannot tell the cells apart, but their test scores differ."""
        validation, test = random.normal(size=(12, len(cells))), worth + random.normal(size=(12, len(cells)))

        def trainer(problem, arm, seeds, cells_now, snapshots):
            at = [(seed, cell, (seed, cells.index(cell))) for seed in seeds for cell in cells_now]
            return {
                (seed, cell): [Outcome({"accuracy": validation[k]}, {"accuracy": test[k]}, 1.0, 0.0)]
                for seed, cell, k in at
            }

        own = sweep(trainer, seeds=12, grid=grid, edges=True).test("accuracy")
        return own, test[:, validation.mean(0).argmax()]

    outside = np.zeros(2)
    for _ in range(pairs):
        worth = random.normal(0, 0.5, len(cells))
        first, second = arm(worth), arm(worth)
        for k in (0, 1):
            mean, half, _, _ = statistics.compare(first[k], second[k])
            outside[k] += abs(mean) > half
    # 5% of the pairs, and four standard errors of that.
    assert outside[0] / pairs < 0.05 + 4 * np.sqrt(0.05 * 0.95 / pairs)
    assert outside[1] / pairs > 0.2


def test_values_that_are_no_pairs_are_refused():
    with pytest.raises(ValueError, match="pairs of at least 2 seeds"):
        statistics.compare(np.zeros(12), np.zeros(11))


def test_the_bootstrap_takes_a_family_of_data_sets_as_one():
    differences = np.repeat(np.random.default_rng(0).normal(size=8), 10)
    families = [str(k // 10) for k in range(80)]
    mean, low, high = statistics.bootstrap_over_families(differences, families)
    _, alone_low, alone_high = statistics.bootstrap_over_families(differences, [str(k) for k in range(80)])
    assert low < mean < high
    # 80 independent sets would give an interval narrower by the root of 10, give or take the draws.
    assert 2.5 < (high - low) / (alone_high - alone_low) < 4


# --- tables ---


def test_a_table_read_from_its_runs_is_the_table_that_was_written(tmp_path):
    baseline, other = (
        sweep(pretend(peak(0.1, d)), seeds=12).renamed(n) for n, d in (("a", 0.0), ("b, c", 0.001))
    )
    results = [Result("here", baseline), Result("here", other, "a")]
    table = Table.of({"command": "x: y"}, ["accuracy"], results)
    table.write(tmp_path / "t.csv")
    again = Table.read(tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_text() == again.summary_text()
    assert again.header == table.header
    assert len(again.compared()) == 1
    assert again.header["comparisons"].startswith("1; the 95% interval excludes 0 in ")
    line = again.line("here", "b", "accuracy")
    assert line.baseline == "a"
    # Compared with its own baseline, an arm has the line that the table has.
    assert again.against("here", "b, c", "a", "accuracy") == line
    other = again.against("here", "a", "b, c", "accuracy")
    assert (other.baseline, other.difference) == ("b, c", pytest.approx(-line.difference, rel=1e-12))


@pytest.mark.parametrize("name", COMMITTED)
def test_a_committed_table_follows_from_its_runs(name):
    table = read(name)
    assert COMMITTED[name].path.read_text() == table.summary_text()
    assert table.header["command"] == f"python examples/evidence/{name}.py --full"
    assert {"versions", "time", "comparisons"} <= set(table.header)
    assert table.metrics == COMMITTED[name].metrics


@pytest.mark.parametrize("name", COMMITTED)
def test_a_committed_table_keeps_the_rules(name):
    table = read(name)
    assert min(line.seeds for line in table.lines) >= 12
    assert not any(math.isnan(line.mean) for line in table.lines)
    untuned = [run for run in table.runs if run["grid"] == "NOT TUNED"]
    assert all("NOT TUNED" in run["setting"] or "at rate" in run["arm"] for run in untuned)


@pytest.mark.parametrize("name", COMMITTED)
def test_a_committed_picture_was_drawn_from_the_committed_table(name):
    with Image.open(COMMITTED[name].path.with_suffix(".png")) as picture:
        assert picture.text["Comment"] == f"table {read(name).fingerprint()}"


def test_the_pages_say_what_the_tables_say():
    for page, text in readme.pages().items():
        assert page.read_text() == text, page
    with Image.open(readme.RESULTS / "forest.png") as picture:
        assert picture.text["Comment"] == readme.forest_key()


def test_the_page_of_the_polluted_pool_says_whether_a_prior_is_needed():
    page = readme.page(ROWS["polluted"])
    assert f"(scratch.md): {ROWS['scratch'].sentence(read('scratch'))}" in page
    assert "scratch.md" not in readme.page(ROWS["ramp"])


def test_the_guide_has_short_cells():
    for line in readme.guide().splitlines():
        for cell in line.strip("|").split("|"):
            assert len(cell.split()) <= 25, cell


def test_every_row_claims_one_comparison_of_its_table():
    for name, row in COMMITTED.items():
        if name == "aa":
            assert row.claim is None
            continue
        line = row.claim.line(read(name))
        assert line.arm == row.claim.arm
        assert line.baseline


def test_trainings_that_do_not_differ_are_told_apart_in_at_most_seven_of_a_hundred_intervals():
    aa = importlib.import_module("aa")
    of_kind = aa.kinds(read("aa"))
    assert sum(map(len, of_kind.values())) >= 300
    # Losses diverge in some seeds, which widens their intervals: the accuracies alone must pass too.
    for lines in of_kind.values():
        outside, number = aa.rate(lines)
        assert number >= 100
        assert outside <= 0.07 * number


def test_every_placebo_is_compared_with_plain_training():
    lines = readme.placebos()
    assert len(lines) >= 200
    assert {line.baseline for line in lines} <= {"plain", "s = 0", "cross-entropy", "ERM", "MAML"}
    assert readme.share(lines) in (FOLDER / "README.md").read_text()


def test_figures_of_the_pages_written_by_hand_are_those_of_the_rows():
    docs = FOLDER.parents[1] / "docs"
    rows = "".join(path.read_text() for path in readme.RESULTS.glob("*.md"))
    for name in ("which.md", "groups.md"):
        figures = re.findall(r"[+-]\d+\.\d+ ± \d+\.\d+", (docs / name).read_text())
        assert figures
        assert [figure for figure in figures if figure not in rows] == []


def test_what_is_said_of_the_papers_figure_follows_from_interval_and_power():
    claim = harness.Claim("here", "a", "accuracy", "", harness.Reported(1.0, "there"))

    def said(differences, claim=claim):
        runs = [
            dict(zip(RUN_COLUMNS, ("here", arm, base, "0", "0", "", "1", str(seed)), strict=True))
            | {"accuracy": str(value)}
            for arm, base, values in (("plain", "", np.zeros(12)), ("a", "plain", differences))
            for seed, value in enumerate(values)
        ]
        return claim.of_paper(Table({}, ["accuracy"], runs))

    spread = np.linspace(-1, 1, 12)
    assert said(0.002 * spread).endswith("excluded here.")
    assert said(0.03 * spread).endswith("could not have told.")
    assert said(0.01 + 0.002 * spread).endswith("within the interval.")
    other = dataclasses.replace(claim, paper=harness.Reported(1.0, "there", metric="accuracy"))
    assert said(0.001 + 0.002 * spread, other).endswith("excluded here (of accuracy, +0.1 ± 0.1).")


@pytest.mark.parametrize("name", ROWS)
def test_a_program_runs_quickly_from_end_to_end(name, tmp_path, capsys):
    if name == "trees":
        pytest.importorskip("lightgbm")
    table = harness.main(ROWS[name], ["--quick", "--output", str(tmp_path)])
    assert (tmp_path / f"{name}.csv").read_text() == table.summary_text()
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert ROWS[name].sentence(table) in capsys.readouterr().out


# --- the demo ---


def test_the_demo_trains_each_seed_at_the_cell_that_it_chose(tmp_path, capsys):
    demo = importlib.import_module("demo")
    table = demo.main(["--quick", "--output", str(tmp_path / "dial.png")])
    assert (tmp_path / "dial.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert demo.markdown(table) in printed
    assert "criterion = RGDLoss(scale=-0.7)" in printed
    for (setting, arm), runs in table.by_arm.items():
        chosen = read("ramp").by_arm[setting, arm]
        for run, own in zip(runs, chosen, strict=False):
            assert (run["learning_rate"], run["weight_decay"]) == (own["learning_rate"], own["weight_decay"])
    assert set(table.arms(table.settings()[0])) == set(demo.ARMS)


def test_the_demos_pictures_and_table_are_those_of_the_committed_row():
    demo = importlib.import_module("demo")
    assert demo.markdown(read("ramp")) in (FOLDER.parents[1] / "README.md").read_text()


# --- losses of others, and what only some arms have ---


def test_a_ramp_starts_plain_and_ends_at_its_scale():
    ramp = harness.Ramp(-1.0)
    assert [ramp.at(done).scale for done in (0.0, 0.25, 0.5, 0.9)] == [0, -0.5, -1, -1]


def test_a_ramp_trains_as_weightings_that_are_set_by_hand(small):
    arm, cell = Arm("ramp", harness.Ramp(-1.0)), Cell(0.3, 0.0)
    found = harness.train(small, arm, (3,), [cell])[3, cell][-1]
    data = small.draw(3)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    start = train_module.initial((6, 5, 3), [3], 1)
    with torch.no_grad():
        for layer, weight, bias in zip(model[::2], start[::2], start[1::2], strict=True):
            layer.weight.copy_(weight[0].T)
            layer.bias.copy_(bias[0, 0])
    criterion = RGDLoss(scale=-1.0)
    optimizer = torch.optim.SGD(model.parameters(), 0.3, 0.9)
    batches = train_module.orders([3], len(data.train.target), 8, small.epochs)[0]
    for step, batch in enumerate(batches):
        criterion.weighting = rgd.KL(scale=-min(1.0, 2 * step / len(batches)))
        optimizer.param_groups[0]["lr"] = 0.3 * (0.5 + 0.5 * math.cos(math.pi * step / len(batches)))
        optimizer.zero_grad()
        criterion(model(data.train.inputs[batch]), data.train.target[batch]).backward()
        optimizer.step()
    losses = small.losses(model(data.test.inputs), data.test.target)
    # 20 steps in float64: rounding alone may tell the two apart.
    assert found.test["mean_loss"] == pytest.approx(losses.mean().item(), rel=1e-10)


def drawn(seed=0):
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
    return outputs, torch.randint(3, (2, 5), generator=generator)


def test_smoothing_is_cross_entropy_with_the_smoothed_target():
    outputs, target = drawn()
    soft = 0.7 * nn.functional.one_hot(target, 3).double() + 0.3 / 3
    expected = -(soft * outputs.log_softmax(-1)).sum(-1)
    assert torch.allclose(harness.losses.Smoothed(0.3)(outputs, target, None), expected, rtol=1e-13)


def test_symmetric_cross_entropy_adds_the_reverse_with_log_zero_as_minus_four():
    outputs, target = drawn()
    p, label = outputs.softmax(-1), nn.functional.one_hot(target, 3).double()
    forward = -(label * p.log()).sum(-1)
    reverse = -(p * torch.where(label == 1, 0.0, -4.0)).sum(-1)
    found = harness.losses.SymmetricCrossEntropy()(outputs, target, None)
    assert torch.allclose(found, 0.1 * forward + reverse, rtol=1e-12)


def test_early_learning_remembers_the_probabilities_of_each_sample():
    loss = harness.losses.EarlyLearning(strength=3.0, memory=0.7)
    losses = loss.begin(2, 7, 3)
    outputs, target = drawn()
    first, second = torch.tensor([[0, 1, 2, 3, 4]] * 2), torch.tensor([[4, 5, 6, 0, 1]] * 2)
    losses(outputs.float(), target, first)
    other, labels = drawn(1)
    p, q = (x.softmax(-1) for x in (outputs, other))
    means = torch.zeros(2, 7, 3, dtype=torch.float64)
    for index, shares in ((first, p), (second, q)):
        means[:, index[0]] = 0.7 * means[:, index[0]] + 0.3 * shares
    expected = nn.functional.cross_entropy(other.flatten(0, 1), labels.flatten(), reduction="none").view(2, 5)
    expected = expected + 3 * (1 - (means[:, second[0]] * q).sum(-1)).log()
    # float32, sums of three numbers below 10.
    assert torch.allclose(losses(other.float(), labels, second).double(), expected, rtol=0, atol=1e-5)


def test_mixup_mixes_neighbours_and_their_losses(small):
    cell = Cell(0.1, 0.0)
    plain, mixed = (harness.train(small, Arm("a", mixup=m), (0,), [cell])[0, cell][-1] for m in (0.0, 1.0))
    assert plain.test != mixed.test
    shares = train_module.mixtures([0, 1], 2000, 1.0)
    # Beta(1, 1): mean 1/2, variance 1/12; six standard errors.
    assert shares.mean().item() == pytest.approx(0.5, abs=6 / math.sqrt(12 * 4000))
    assert not torch.equal(shares[0], shares[1])


def test_a_balanced_sampler_draws_every_group_alike():
    groups = torch.tensor([[0] * 90 + [1] * 10, [0] * 50 + [1] * 50])
    drawn = train_module.balanced([0, 1], groups, 10, 400)
    assert drawn.shape == (2, 400, 10)
    share = groups.gather(1, drawn.flatten(1)).double().mean(1)
    # A share of 4000 draws; six standard errors.
    assert share.tolist() == pytest.approx([0.5, 0.5], abs=6 * 0.5 / math.sqrt(4000))


def test_pair_flips_go_to_the_next_class():
    clean, noisy = (
        harness.digits(0.0).draw(4).train.target,
        harness.digits(0.3, pairs=True).draw(4).train.target,
    )
    changed = clean != noisy
    assert changed.double().mean().item() == pytest.approx(0.3, abs=1 / len(clean))
    assert torch.equal(noisy[changed], (clean[changed] + 1) % 10)
