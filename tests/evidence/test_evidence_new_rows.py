"""The evidence programs of the polluted pool and of the suspects: what is special in them."""

import dataclasses
import functools
import importlib
import pathlib
import sys

import numpy as np
import pytest
import rgd
import torch
import torch.nn.functional as F

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples" / "evidence"))

from harness import Arm, Cell, Ramp, Session, Store, digits, train
from harness.train import Weigher, initial, orders

polluted = importlib.import_module("polluted")
scratch = importlib.import_module("scratch")
suspects = importlib.import_module("suspects")

SIZES = polluted.QUICK
LENGTH = polluted.CONTEXT + polluted.PREDICTED
CELLS = [Cell(0.1, 0.0), Cell(0.4, 0.001)]
EPS = torch.finfo(torch.float32).eps


# --- polluted ---


@pytest.fixture(autouse=True)
def small_library(monkeypatch):
    """Twenty files whose sequences no other file has: a file's letter in front, then random letters."""
    random = np.random.default_rng(0)
    files = []
    for k in range(20):
        rows = random.integers(20, 60, (60, LENGTH), dtype=np.uint8)
        rows[:, 0] = k
        files.append(rows.reshape(-1))
    polluted.split.cache_clear()
    polluted.prior.cache_clear()
    monkeypatch.setattr(polluted, "library", lambda: tuple(files))
    yield
    polluted.split.cache_clear()
    polluted.prior.cache_clear()


def going_on(seeds=2):
    return polluted.Polluted("goes on", SIZES, prior=(CELLS[0],) * seeds)


def test_the_pool_keeps_the_characters_of_a_sequence_and_shuffles_them(monkeypatch):
    found = polluted.split(SIZES, 0)
    monkeypatch.setattr(polluted, "shuffle", lambda rows, random: rows)
    polluted.split.cache_clear()
    before = polluted.split(SIZES, 0)
    assert torch.equal(found.train.sort(1).values, before.train.sort(1).values)
    same = (found.train == before.train).all(1)
    assert torch.equal(same, ~found.shuffled)
    # Of a random order of 40 letters, about one letter a sequence stays in its place.
    stays = (found.train == before.train)[found.shuffled].double().mean()
    assert stays < 0.1


def test_seven_tenths_of_the_pool_are_shuffled_and_no_clean_sequence():
    found = polluted.split(SIZES, 0)
    assert len(found.train) == SIZES.clean + SIZES.pool
    assert not found.shuffled[: SIZES.clean].any()
    assert int(found.shuffled.sum()) == round(0.7 * SIZES.pool)
    arm = polluted.SequenceArm("x")
    kept = {
        on: polluted.kept_of(dataclasses.replace(arm, on=on), found, SIZES)
        for on in ("all", "first", "clean")
    }
    assert kept["all"].tolist() == list(range(len(found.train)))
    assert kept["first"].tolist() == list(range(SIZES.clean))
    assert kept["clean"].tolist() == [k for k in range(len(found.train)) if not found.shuffled[k]]


def test_what_trains_chooses_and_tests_is_from_different_files(monkeypatch):
    monkeypatch.setattr(polluted, "shuffle", lambda rows, random: rows)
    found = polluted.split(SIZES, 1)
    files = [set(part[:, 0].tolist()) for part in (found.train, found.validation, found.test)]
    assert [len(found.validation), len(found.test)] == [SIZES.validation, SIZES.test]
    assert not files[0] & files[1]
    assert not files[0] & files[2]
    assert not files[1] & files[2]


def test_the_library_has_blanks_in_a_row_as_one(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(polluted, "standard_library", lambda: [b"a \t  b\n\xc3\xa9c"])
    polluted.library.cache_clear()
    (numbers,) = polluted.library()
    polluted.library.cache_clear()
    assert "".join(polluted.CHARACTERS[k] for k in numbers) == "a b\nc"


def test_a_character_is_predicted_from_those_before_it_alone():
    parameters = [p[:1] for p in polluted.initial([0])]
    rows = polluted.split(SIZES, 0).train[None, :3]
    logits = polluted.forward(parameters, rows).view(3, polluted.PREDICTED, -1)
    place = polluted.CONTEXT + 5
    other = rows.clone()
    other[:, :, place] = (other[:, :, place] + 1) % len(polluted.CHARACTERS)
    changed = polluted.forward(parameters, other).view(3, polluted.PREDICTED, -1) != logits
    where = changed.any(-1).any(0).nonzero().squeeze(1).tolist()
    assert where == list(range(6, 6 + polluted.CONTEXT))
    # The same by plain torch, for one place.
    table, first, bias, second, last = (p[0] for p in parameters)
    window = table[rows[0, 1, 5 : 5 + polluted.CONTEXT]].flatten()
    plain = (window @ first + bias[0]).relu() @ second + last[0]
    # Sums of 128 and 64 products in float32, of numbers about 1.
    assert torch.allclose(logits[1, 5], plain, rtol=0, atol=200 * EPS)


def plain_training(problem, seed, cell, weights_of):
    """One network by torch's own optimizer, from the prior; `weights_of` losses (B, T) and sequences."""
    split = problem.draw(seed)
    begun = polluted.prior(problem.sizes, seed, problem.prior[seed])
    batches = orders([seed], len(split.train), polluted.BATCH, SIZES.epochs)[0]
    return descended(begun, split.train, batches, cell, weights_of)


def descended(begun, train, batches, cell, weights_of):
    """The parameters after the steps of some batches of the sequences `train`."""
    parameters = [p.clone().requires_grad_() for p in begun]
    optimizer = torch.optim.SGD(parameters, cell.learning_rate, momentum=0.9, weight_decay=cell.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    for batch in batches:
        rows = train[batch]
        windows = rows.unfold(1, polluted.CONTEXT, 1)[:, : polluted.PREDICTED]
        table, first, bias, second, last = parameters
        logits = (table[windows].flatten(2) @ first + bias).relu() @ second + last
        losses = F.cross_entropy(logits.transpose(1, 2), rows[:, polluted.CONTEXT :], reduction="none")
        optimizer.zero_grad()
        (weights_of(losses.detach(), rows) * losses).mean().backward()
        optimizer.step()
        schedule.step()
    return [p.detach() for p in parameters]


def tilted(values):
    weights = torch.exp(-3 * (values - values.min()))
    return (weights / weights.mean())[:, None]


def reference_of(problem, seed, rows):
    network = [p[None] for p in polluted.prior(problem.sizes, seed, problem.prior[seed])]
    return polluted.evaluated(network, rows)[0][0]


def excess_half(problem, seed, losses, rows):
    """The half of the sequences with the largest excess loss."""
    excess = (losses - reference_of(problem, seed, rows)).mean(1)
    kept = torch.zeros_like(excess)
    kept[excess.topk(len(excess) // 2).indices] = 2
    return kept[:, None]


@pytest.mark.parametrize("name", [polluted.PLAIN, polluted.DIAL, polluted.FIXED, polluted.OTHERS])
def test_the_trainer_is_sgd_on_weighted_losses_from_the_prior(name):
    problem, seed = going_on(), 1
    arm = next((arm for arm in polluted.arms() if arm.name == name), polluted.SequenceArm(name))
    ways = {
        polluted.PLAIN: lambda losses, rows: torch.ones(len(losses), 1),
        polluted.DIAL: lambda losses, rows: tilted(losses.mean(1)),
        polluted.FIXED: lambda losses, rows: tilted(reference_of(problem, seed, rows).mean(1)),
        polluted.OTHERS: lambda losses, rows: tilted(losses.mean(1)).roll(1, 0),
    }
    networks, _ = polluted.trained(problem, arm, [0, seed], CELLS)
    own = [p[3] for p in networks]  # seed 1, cell 1
    plain = plain_training(problem, seed, CELLS[1], ways[name])
    unlike = plain_training(problem, seed, CELLS[1], lambda losses, rows: torch.rand(len(losses), 1))
    # Twelve steps in float32 of numbers about 1, whose sums of 576 terms are in another order.
    assert distance(own, plain) < 1e3 * EPS < 0.1 * distance(own, unlike)


def distance(own, other):
    """The largest difference of two networks' parameters."""
    return max((a - b).abs().max().item() for a, b in zip(own, other, strict=True))


def test_rho_1_keeps_the_half_with_the_largest_excess_loss():
    problem = going_on()
    rho = next(arm for arm in polluted.arms() if arm.name == polluted.RHO_SEQUENCE)
    random = np.random.default_rng(0)
    losses = torch.tensor(random.uniform(0, 4, (1, polluted.BATCH, polluted.PREDICTED)), dtype=torch.float32)
    rows = problem.draw(0).train[: polluted.BATCH]
    excess = losses - reference_of(problem, 0, rows)
    expected = excess_half(problem, 0, losses[0], rows)
    weights = polluted.weights_of(Weigher(rho.weighting, 1), excess, rho.per)
    assert torch.equal(weights[0], expected)
    assert rho.sees == "excess"
    by_character = next(arm for arm in polluted.arms() if arm.name == polluted.RHO)
    weights = polluted.weights_of(Weigher(by_character.weighting, 1), excess, by_character.per)
    assert weights.shape == excess.shape
    assert excess[weights == 2].min() > excess[weights == 0].max()
    assert int((weights == 2).sum()) == excess.numel() // 2


def test_weights_by_the_reference_do_not_change_with_the_network(monkeypatch):
    """A step so small and one so large see the same numbers; by the network's own loss they do not."""
    seen = {}
    original = polluted.weights_of

    def spy(weigher, values, per):
        seen.setdefault(spy.arm, []).append(values)
        return original(weigher, values, per)

    problem = going_on()
    polluted.prior(SIZES, 0, CELLS[0])
    monkeypatch.setattr(polluted, "weights_of", spy)
    for name in (polluted.FIXED, polluted.HALF, polluted.DIAL, polluted.RHO_SEQUENCE):
        spy.arm = name
        arm = next(arm for arm in polluted.arms() if arm.name == name)
        polluted.trained(problem, arm, [0], [Cell(1e-6, 0.0), Cell(0.8, 0.0)])
    for name, values in seen.items():
        last = values[-1]
        fixed = name in {polluted.FIXED, polluted.HALF}
        assert torch.equal(last[0], last[1]) == fixed, name
    batches = orders([0], SIZES.clean + SIZES.pool, polluted.BATCH, SIZES.epochs)[0]
    rows = problem.draw(0).train[batches[-1]]
    expected = reference_of(problem, 0, rows)
    assert torch.allclose(seen[polluted.FIXED][-1][0], expected, rtol=100 * EPS)
    # Excess losses are 0 as long as the network is the prior.
    assert seen[polluted.RHO_SEQUENCE][0].abs().max() < 100 * EPS
    assert seen[polluted.RHO_SEQUENCE][-1][1].abs().max() > 0.1


def test_all_arms_go_on_for_as_many_steps(monkeypatch):
    problem = going_on()
    polluted.prior(SIZES, 0, CELLS[0])
    steps = []
    monkeypatch.setattr(
        polluted, "weights_of", lambda weigher, values, per: steps.append(1) or torch.ones_like(values)
    )
    counts = set()
    for arm in (polluted.SequenceArm(polluted.PLAIN), *polluted.arms()):
        steps.clear()
        polluted.trained(problem, arm, [0], CELLS[:1])
        counts.add(len(steps))
    assert counts == {(SIZES.clean + SIZES.pool) // polluted.BATCH * SIZES.epochs}


def test_losses_are_reported_where_the_loss_chose_and_accuracy_where_it_did():
    results = polluted.run(Session(quick=True, store=Store(), seeds=2))
    for result in results:
        metrics = {"accuracy"} if result.setting == polluted.BY_ACCURACY else {"mean_loss", "worst_tenth"}
        assert set(result.chosen.metrics()) == metrics
    assert {result.setting for result in results} == {polluted.BY_ACCURACY, polluted.BY_LOSS}


# --- scratch ---


def from_scratch():
    return polluted.Polluted("scratch", SIZES, scratch=True)


@pytest.mark.parametrize("name", [polluted.DIAL, polluted.CLEAN])
def test_without_a_prior_a_new_network_is_trained_on_what_the_arm_may_see(name):
    clean = polluted.SequenceArm(polluted.CLEAN, on="first")
    arm = next((arm for arm in scratch.ARMS if arm.name == name), clean)
    seed, own = 1, from_scratch().draw(1)
    steps = SIZES.clean // polluted.BATCH * SIZES.prior_epochs + len(own.train) // polluted.BATCH
    train = own.train[: SIZES.clean] if name == polluted.CLEAN else own.train
    weights_of = tilted if name == polluted.DIAL else torch.ones_like
    begun = [p[0] for p in polluted.initial([seed])]
    batches = orders([seed], len(train), polluted.BATCH, steps)[0][:steps]
    expected = descended(
        begun, train, batches, CELLS[1], lambda losses, rows: weights_of(losses.mean(1)).view(-1, 1)
    )
    networks, _ = polluted.trained(from_scratch(), arm, [0, seed], CELLS)
    moved = distance(begun, expected)
    # Ten steps in float32 of numbers about 1, whose sums of 576 terms are in another order.
    assert distance([p[3] for p in networks], expected) < 1e3 * EPS < 0.1 * moved


def test_from_scratch_all_arms_take_the_steps_of_prior_and_going_on_together():
    first = polluted.Polluted(polluted.PRIOR, SIZES).steps()
    assert from_scratch().steps() == first + going_on().steps()
    assert first == SIZES.clean // polluted.BATCH * SIZES.prior_epochs


def test_a_cache_tells_trainings_with_prior_from_those_without():
    problems = [polluted.Polluted(polluted.PRIOR, SIZES), going_on(), from_scratch()]
    assert len({problem.key() for problem in problems}) == 3


def test_one_cell_at_a_time_gives_what_all_at_once_give():
    arm = scratch.ARMS[2]
    apart, together = (
        trainer(from_scratch(), arm, [0, 1], CELLS) for trainer in (scratch.by_cell, polluted.train)
    )
    assert set(apart) == set(together)
    for run in apart:
        losses = [
            (found[run][0].test["mean_loss"], found[run][0].test["worst_tenth"])
            for found in (apart, together)
        ]
        # Numbers of 3 to 5 after ten steps in float32.
        assert losses[0] == pytest.approx(losses[1], abs=1e3 * EPS)


def test_from_scratch_every_arm_meets_the_clean_sequences_alone():
    results = scratch.run(Session(quick=True, store=Store(), seeds=2))
    for here in polluted.REPORTED:
        baselines = {r.chosen.arm.name: r.baseline for r in results if r.setting == here}
        assert baselines.pop(polluted.CLEAN) == ""
        assert set(baselines) == {"plain", "s = -1", "s = -3"}
        assert set(baselines.values()) == {polluted.CLEAN}
    for result in results:
        metrics = {"accuracy"} if result.setting == polluted.BY_ACCURACY else {"mean_loss", "worst_tenth"}
        assert set(result.chosen.metrics()) == metrics


# --- suspects ---


@functools.cache
def noisy(epochs=3):
    return digits(0.3, epochs=epochs, pairs=True)


def plain_losses(problem, arm, seed, cell):
    """Losses (steps, n) of every sample when it was seen, NaN when not, by torch's own optimizer."""
    data = problem.draw(seed).train
    begun = initial((problem.features, *problem.hidden, problem.outputs), [seed], 1)
    parameters = [p[0].clone().requires_grad_() for p in begun]
    optimizer = torch.optim.SGD(parameters, cell.learning_rate, momentum=0.9, weight_decay=cell.weight_decay)
    batches = orders([seed], len(data.target), problem.batch_size, problem.epochs)[0]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    seen = torch.full((len(batches), len(data.target)), torch.nan, dtype=torch.float64)
    for step, batch in enumerate(batches):
        first, bias, second, last = parameters
        logits = (data.inputs[batch] @ first + bias).relu() @ second + last
        losses = F.cross_entropy(logits, data.target[batch], reduction="none")
        seen[step, batch] = losses.detach().double()
        scale = -min(1.0, 2 * step / len(batches)) if isinstance(arm.weighting, Ramp) else -0.7
        optimizer.zero_grad()
        (torch.exp(scale * losses.detach()) * losses).mean().backward()
        optimizer.step()
        schedule.step()
    return seen


@pytest.mark.parametrize("weighting", [rgd.KL(scale=-0.7), Ramp(-1.0)], ids=["constant", "ramp"])
def test_recorded_losses_are_those_of_a_plain_computation(weighting):
    problem, arm, cells = noisy(), Arm("x", weighting), [Cell(0.1, 0.0), Cell(0.2, 0.004)]
    whole, last, outcomes = suspects.recorded(problem, arm, [0, 3], cells)
    seen = plain_losses(problem, arm, 3, cells[1])
    steps = len(seen)
    assert steps == 500 // 32 * 3
    # Losses of about 2 after 45 steps in float32.
    tolerance = {"rtol": 2e3 * EPS, "atol": 2e3 * EPS, "equal_nan": True}
    assert torch.allclose(whole[1, 1], seen.nanmean(0), **tolerance)
    assert torch.allclose(last[1, 1], seen[-(steps // 3) :].nanmean(0), **tolerance)
    assert not torch.allclose(whole[1, 1], last[1, 1], **tolerance)
    # Recording changes nothing of the training.
    alone = train(problem, arm, [0, 3], cells)
    for run, (outcome,) in alone.items():
        assert outcome.test == outcomes[run][0].test
        assert outcome.mean_weight == outcomes[run][0].mean_weight


def test_wrong_labels_are_those_that_differ_from_the_same_split_without_noise():
    truth = suspects.Truth(noisy(), digits(0.0))
    wrong = truth.wrong(2)
    assert int(wrong.sum()) == 150
    given, right = noisy().draw(2).train.target, digits(0.0).draw(2).train.target
    assert torch.equal(given[wrong], (right[wrong] + 1) % 10)
    other = suspects.Truth(noisy(), digits(0.0, sizes=(500, 200)))
    assert (other.wrong(2) == wrong).all()
    with pytest.raises(ValueError, match="split seed 2 differently"):
        suspects.Truth(
            noisy(), dataclasses.replace(digits(0.0), draw=lambda s: digits(0.0).draw(s + 1))
        ).wrong(2)


def test_shares_are_one_minus_precision_and_recall():
    wrong = np.array([True, True, True, True, False, False, False])
    scores = suspects.scored(np.array([0, 4, 1, 5]), wrong)
    assert scores == {"false_share": 0.5, "missed_share": 0.5, "first_half_false_share": 0.5}
    scores = suspects.scored(np.array([2, 3, 1, 5, 6]), wrong)
    assert scores == pytest.approx({"false_share": 0.4, "missed_share": 0.25, "first_half_false_share": 0})
    nothing = suspects.scored(np.array([], np.int64), wrong)
    assert nothing == {"false_share": 0, "missed_share": 1, "first_half_false_share": 0}


def test_as_many_samples_are_named_as_there_are_wrong_labels():
    problem, cell = noisy(30), Cell(0.1, 0.002)
    truth = suspects.Truth(problem, digits(0.0))
    arm = Arm("s = -0.7", rgd.KL(scale=-0.7))
    first, last = suspects.by_losses(problem, arm, [0], [cell], truth=truth)[0, cell]
    whole, _, _ = suspects.recorded(problem, arm, [0], [cell])
    named = whole[0, 0].argsort(descending=True)[:150].numpy()
    assert first.test == suspects.scored(named, truth.wrong(0))
    assert first.test["false_share"] == first.test["missed_share"]
    # Random samples have 70% right labels among them.
    assert first.test["false_share"] < 0.2
    assert last.test != first.test


def test_held_out_probabilities_come_from_networks_that_did_not_see_the_sample():
    problem, cell, seed = noisy(), Cell(0.2, 0.0), 1
    probabilities, weights = suspects.held_out_probabilities(problem, Arm("plain"), [0, seed], cell)
    assert weights == {0: pytest.approx(1), seed: pytest.approx(1)}
    data = problem.draw(seed).train
    splits = suspects.folds(data, seed)
    assert sorted(k for _, left_out in splits for k in left_out) == list(range(500))
    for number, (kept, left_out) in enumerate(splits):
        assert not set(kept) & set(left_out)
        part = suspects.without_fold(problem.draw, number, seed)
        assert torch.equal(part.train.target, data.target[kept])
        assert torch.equal(part.test.inputs, data.inputs[left_out])
    # Another label of a sample changes what is said of the others, and nothing of its own fold.
    place = int(splits[2][1][0])

    def changed(s):
        drawn = problem.draw(s)
        target = drawn.train.target.clone()
        target[place] = target[splits[2][1]][target[splits[2][1]] != target[place]][0]
        return drawn._replace(train=drawn.train._replace(target=target))

    same_folds = suspects.folds
    try:
        suspects.folds = lambda train, s: splits
        before, _ = suspects.held_out_probabilities(problem, Arm("plain"), [seed], cell)
        other = dataclasses.replace(problem, draw=changed)
        after, _ = suspects.held_out_probabilities(other, Arm("plain"), [seed], cell)
    finally:
        suspects.folds = same_folds
    differs = (before[seed] != after[seed]).any(1)
    assert not differs[splits[2][1]].any()
    assert differs[np.concatenate([splits[k][1] for k in (0, 1, 3, 4)])].all()
    assert probabilities[seed].sum(1) == pytest.approx(np.ones(500))


def test_cleanlabs_list_begins_with_what_it_finds_and_goes_on_by_quality():
    pytest.importorskip("cleanlab")
    random = np.random.default_rng(0)
    right = random.integers(0, 4, 200)
    labels = right.copy()
    labels[:40] = (labels[:40] + 1) % 4
    probabilities = random.dirichlet(np.ones(4), 200) + 2 * np.eye(4)[right]
    probabilities /= probabilities.sum(1, keepdims=True)
    found, order = suspects.by_cleanlab(labels, probabilities)
    assert sorted(order) == list(range(200))
    assert order[: len(found)].tolist() == found.tolist()
    own = probabilities[np.arange(200), labels]
    assert (np.diff(own[found]) >= 0).all()
    assert (np.diff(own[order[len(found) :]]) >= 0).all()
    assert np.isin(order[:40], range(40)).mean() > 0.9


def test_without_cleanlab_a_full_run_says_what_to_install_and_a_quick_one_goes_on(monkeypatch, capsys):
    monkeypatch.setattr(suspects.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install cleanlab"):
        suspects.has_cleanlab(Session(quick=False, store=Store()))
    results = suspects.run(Session(quick=True, store=Store(), seeds=2))
    assert "arms are left out" in capsys.readouterr().out
    arms = [result.chosen.arm.name for result in results]
    assert suspects.DIAL in arms
    assert not any("cleanlab" in arm for arm in arms)
    assert {result.baseline for result in results} == {"", suspects.HELD_OUT, suspects.PLAIN}


def test_the_chosen_cell_is_trained_again_and_no_other():
    session = Session(quick=True, store=Store(), seeds=2)
    problem = noisy(1)
    chosen = session.sweep(problem, Arm("plain"))
    asked = []

    def trainer(problem, arm, seeds, cells, snapshots):
        asked.extend((seed, cell) for seed in seeds for cell in cells)
        return train(problem, arm, seeds, cells, snapshots)

    again = suspects.at_chosen(session, problem, chosen, trainer, how="again", trainings="1 training")
    assert sorted(asked) == [(k, choice.cell) for k, choice in enumerate(chosen.choices)]
    assert [o[0].test for o in again.outcomes] == [o[-1].test for o in chosen.outcomes]
    assert all(choice.grid.endswith("; 1 training") for choice in again.choices)
