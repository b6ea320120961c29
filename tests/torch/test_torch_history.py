"""The losses of each sample over a training: sums, checkpoints, processes, and the wrong labels they name."""

import pytest
import rgd
import torch
from rgd.torch import LossHistory, RGDLoss
from torch import nn


def test_the_mean_of_each_sample_is_taken_over_the_times_it_was_seen():
    history = LossHistory(4)
    history.update(torch.tensor([2, 0]), torch.tensor([1.0, 3.0]))
    history.update(torch.tensor([2, 2], dtype=torch.int32), torch.tensor([2.0, 6.0], dtype=torch.bfloat16))
    history.update(torch.tensor([3]), torch.tensor([[1.0, 3.0]], requires_grad=True))
    torch.testing.assert_close(
        history.mean(), torch.tensor([3.0, torch.nan, 3.0, 2.0], dtype=torch.float64), equal_nan=True
    )
    assert history.seen().tolist() == [1, 0, 3, 1]
    assert len(history) == 4
    history.reset()
    assert history.mean().isnan().all()


def test_a_history_goes_through_a_checkpoint():
    history, other = LossHistory(3), LossHistory(3)
    history.update(torch.tensor([0, 1]), torch.tensor([1.0, 2.0]))
    state = history.state_dict()
    history.update(torch.tensor([0]), torch.tensor([9.0]))
    other.load_state_dict(state)
    assert other.mean()[:2].tolist() == [1.0, 2.0]
    with pytest.raises(ValueError, match="3 samples"):
        other.load_state_dict(LossHistory(2).state_dict())


@pytest.mark.parametrize(
    ("index", "losses", "error", "match"),
    [
        (torch.tensor([3]), torch.ones(1), IndexError, "index 3 is out of range"),
        (torch.tensor([-1]), torch.ones(1), IndexError, "index -1"),
        (torch.tensor([0.0]), torch.ones(1), TypeError, "integers"),
        (torch.tensor([0]), torch.ones(1, dtype=torch.int64), TypeError, "floating"),
        (torch.tensor([0, 1]), torch.ones(1), ValueError, "one place for each sample"),
        (torch.tensor(0), torch.ones(()), ValueError, "one place for each sample"),
        (torch.tensor([0]), None, ValueError, "there are no losses"),
        ([0], torch.ones(1), TypeError, "index must be a tensor, got list"),
        (torch.tensor([0]), [1.0], TypeError, "losses must be a tensor, got list"),
    ],
)
def test_bad_updates_are_refused_and_change_nothing(index, losses, error, match):
    history = LossHistory(3)
    with pytest.raises(error, match=match):
        history.update(index, losses)
    assert not history.seen().any()
    with pytest.raises(ValueError, match="number of samples"):
        LossHistory(-1)


def gathered(rank, size):
    history = LossHistory(3)
    history.update(torch.tensor([rank, 2]), torch.tensor([float(rank + 1), float(rank)]))
    together = history.gather()
    return history.seen().tolist(), together.mean().tolist(), together.seen().tolist()


def test_processes_gather_one_history(run):
    for rank, (own, mean, seen) in enumerate(run(2, gathered)):
        assert own == [int(rank == 0), int(rank == 1), 1]
        assert mean == [1.0, 2.0, 0.5]
        assert seen == [1, 1, 2]
    assert LossHistory(2).gather().seen().tolist() == [0, 0]


def test_last_losses_are_the_plain_losses_of_the_last_call():
    logits, target = torch.randn(6, 4), torch.tensor([0, 1, -100, 3, 0, 2])
    criterion = RGDLoss(weighting=rgd.KL(scale=-0.7))
    assert criterion.last_losses is None
    for _ in range(3):
        criterion(logits.clone().requires_grad_(), target)
    expected = nn.functional.cross_entropy(logits, target, reduction="none")
    torch.testing.assert_close(criterion.last_losses, expected)
    criterion.last_losses.zero_()
    torch.testing.assert_close(criterion.last_losses, expected)


def test_a_training_names_most_of_its_wrong_labels():
    torch.manual_seed(0)
    centres = 3 * torch.randn(4, 8)
    right = torch.arange(400) % 4
    inputs, target = centres[right] + torch.randn(400, 8), right.clone()
    wrong = torch.randperm(400)[:80]
    target[wrong] = (target[wrong] + 1) % 4
    model, criterion, history = nn.Linear(8, 4), RGDLoss(scale=-0.7), LossHistory(400)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(10):
        for index in torch.randperm(400).split(50):
            optimizer.zero_grad()
            criterion(model(inputs[index]), target[index]).backward()
            optimizer.step()
            history.update(index, criterion.last_losses)
    found = rgd.suspects(history.mean(), share=0.2, target=target, logits=model(inputs))
    named = torch.as_tensor(found.indices)
    assert torch.isin(named, wrong).double().mean() > 0.9
    assert torch.equal(
        torch.as_tensor(found.proposed)[torch.isin(named, wrong)], right[named][torch.isin(named, wrong)]
    )
