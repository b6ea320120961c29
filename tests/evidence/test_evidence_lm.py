"""The evidence program of the language model: its data, training, temperature, and `--data`."""

import importlib
import math
import pathlib
import sys

import numpy as np
import pytest
import rgd
import torch
import torch.nn.functional as F
from rgd.torch import sample_weights
from scipy import optimize

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples" / "evidence"))

from harness import Cell
from harness.results import Table

lm = importlib.import_module("lm")
SMALL = lm.QUICK_MODEL


def language(texts, steps=3, held_out=(4, 8)):
    return lm.Language("text, 3 steps", texts, SMALL, steps, held_out)


def library(files=20, sequences=40):
    """Files of which each has a byte of its own, and numbers its sequences."""
    return [b"".join(bytes([f, s, *range(SMALL.length - 2)]) for s in range(sequences)) for f in range(files)]


def test_what_trains_chooses_and_tests_is_from_different_files_and_seen_once():
    problem = language(library(), steps=30, held_out=(20, 30))
    split = problem.draw(0)
    assert [len(part) for part in split] == [30 * SMALL.batch, 20, 30]
    files = [set(part[:, 0].tolist()) for part in split]
    assert not files[0] & files[1]
    assert not files[0] & files[2]
    assert not files[1] & files[2]
    for part in split:
        assert len(part.unique(dim=0)) == len(part)
    assert torch.equal(problem.draw(0).train, split.train)
    assert not torch.equal(problem.draw(1).train, split.train)


def test_the_rest_of_a_file_is_no_sequence():
    problem = language([bytes(range(SMALL.length)) + b"rest"] * 3, held_out=(1, 1), steps=0)
    assert problem.draw(0).test.tolist() == [list(range(SMALL.length))]


def test_a_text_that_is_too_short_is_refused_with_its_size():
    with pytest.raises(ValueError, match="2 sequences of 16 bytes for a part that needs 24: give a longer"):
        language([bytes(2 * SMALL.length)] * 3, held_out=(1, 1)).draw(0)


def plain_training(problem, seed, rate, weighting):
    """The same by torch alone: logits, losses, weights."""
    torch.manual_seed(1000 + seed)
    model = lm.Pretraining(problem.model, rgd.ERM(), "sample").model
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    split, means = problem.draw(seed), []
    for step, ids in enumerate(split.train.split(problem.model.batch)):
        for group in optimizer.param_groups:
            group["lr"] = rate * lm.rate_at(step, problem.steps)
        logits = F.linear(model(ids)[:, :-1], model.embedding.weight)
        losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)
        weights = torch.ones_like(losses)
        if weighting is not None:
            weights = sample_weights(losses.detach(), weighting)
        means.append(weights.mean().item())
        optimizer.zero_grad()
        (weights * losses).mean().backward()
        optimizer.step()
    return lm.measure(model, split)[1], float(np.mean(means))


@pytest.mark.parametrize("weighting", [None, rgd.KL(6.0), rgd.CVaR(0.5)], ids=str)
def test_training_is_that_of_plain_torch_with_weights_on_the_sequences(weighting):
    problem = language(library(), steps=3)
    outcome = lm.train(problem, lm.LanguageArm("arm", weighting), [2], [Cell(0.01, 0.1)], ())[
        2, Cell(0.01, 0.1)
    ][-1]
    expected, mean_weight = plain_training(problem, 2, 0.01, weighting)
    other, _ = plain_training(problem, 2, 0.01, rgd.KL(math.inf, scale=-1.0))
    # Float32 rounds each of the sums of 3 steps; what another weighting reaches is far outside of it.
    close = 3 * SMALL.batch * SMALL.length * torch.finfo(torch.float32).eps
    assert outcome.test["mean_loss"] == pytest.approx(expected["mean_loss"], rel=close)
    assert outcome.test["worst_tenth"] == pytest.approx(expected["worst_tenth"], rel=close)
    assert outcome.mean_weight == pytest.approx(mean_weight, rel=close)
    assert outcome.test["mean_loss"] != pytest.approx(other["mean_loss"], rel=close)


def test_weights_by_byte_are_of_bytes_and_are_kept_apart_from_those_of_sequences():
    problem = language(library(), steps=3)
    arms = [lm.LanguageArm("a", rgd.KL(6.0), per=per) for per in ("element", "sample")]
    cell = Cell(0.01, 0.1)
    by_byte, by_sequence = (lm.train(problem, arm, [2], [cell], ())[2, cell][-1] for arm in arms)
    assert by_byte.mean_weight != by_sequence.mean_weight
    assert arms[0].key() != arms[1].key()
    # The first step's losses of a fresh model are near log 256 for every byte, below the clip of 6.
    one = lm.train(language(library(), steps=1), arms[0], [2], [cell], ())[2, cell][-1]
    assert one.mean_weight == pytest.approx(math.exp(math.log(256) / 7), rel=0.01)


def test_the_temperature_has_the_smallest_loss():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5, 8, generator=generator, dtype=torch.float64)
    target = torch.distributions.Categorical(logits=0.7 * logits).sample()

    def loss(scale):
        return F.cross_entropy((scale * logits).flatten(0, 1), target.flatten()).item()

    best = optimize.minimize_scalar(loss, (0.1, 1.0), tol=1e-10).x
    # Newton's error squares at each step; the minimiser by values is good to the root of eps.
    assert lm.inverse_temperature(logits, target) == pytest.approx(best, rel=1e-6)


def test_metrics_are_of_sequences():
    logits = torch.randn(20, 5, 8, generator=torch.Generator().manual_seed(0))
    target = torch.arange(100).view(20, 5) % 8
    of_sequence = [F.cross_entropy(one, own).item() for one, own in zip(logits, target, strict=True)]
    found = lm.metrics(logits, target, 1.0)
    close = 40 * torch.finfo(torch.float32).eps
    assert found["mean_loss"] == pytest.approx(np.mean(of_sequence), rel=close)
    assert found["worst_tenth"] == pytest.approx(np.mean(sorted(of_sequence)[-2:]), rel=close)
    assert found["scaled_worst_tenth"] == found["worst_tenth"]
    assert found["accuracy"] == (logits.argmax(-1) == target).double().mean()
    assert math.isnan(lm.metrics(logits * math.nan, target, 1.0)["accuracy"])


def test_a_text_file_is_learnt_instead_of_the_library(tmp_path, monkeypatch, capsys):
    path = tmp_path / "shakespeare.txt"
    path.write_bytes(b"".join(b"line %d of a text that has many of them\n" % k for k in range(40_000)))
    arguments = ["lm.py", "--data", str(path), "--quick", "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", arguments)
    lm.command_line()
    table = Table.read(tmp_path / "out" / "lm.csv")
    assert table.header["command"] == "python examples/evidence/lm.py --quick --data shakespeare.txt"
    assert table.settings() == [f"shakespeare, {lm.QUICK_STEPS} steps"]
    assert "shakespeare, 8 steps" in capsys.readouterr().out
