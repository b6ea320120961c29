"""Lightning: `RGDLoss` in a module, `RGD` in manual optimization, and the `RGDStats` callback."""

import logging
import warnings

import pytest
import rgd
import torch
from rgd.torch import RGD, RGDLoss, count_targets, reweighted_mean
from torch import nn
from torch.nn import functional as F

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its dependencies warn at import
    pl = pytest.importorskip("lightning.pytorch")

from rgd.integrations.lightning import RGDStats

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

NAMES = ("mean_loss", "objective", "effective_sample_size", "kl_to_uniform", "max_weight", "clipped_share")


class Recorder(pl.loggers.logger.DummyLogger):
    """A logger that keeps what it is given."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))


class Classifier(pl.LightningModule):
    def __init__(self, **criteria):
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Linear(5, 3)
        self.criteria = nn.ModuleDict(criteria)
        self.plain = []

    def training_step(self, batch, _):
        inputs, target = batch
        logits = self.model(inputs)
        self.plain.append(F.cross_entropy(logits.detach(), target).item())
        return sum(criterion(logits, target) for criterion in self.criteria.values())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader(batches=6, size=8):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(batches * size, 5, generator=generator)
    target = torch.randint(3, (batches * size,), generator=generator)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs, target), batch_size=size)


def fit(module, *callbacks, logger=False, **settings):
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=logger,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"log_every_n_steps": 2, **settings},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the loader has few workers
        trainer.fit(module, loader())


def test_the_callback_logs_the_statistics_of_the_logged_steps():
    module, logger = Classifier(ce=RGDLoss()), Recorder()
    fit(module, RGDStats(), logger=logger)
    rows = [row for _, row in logger.rows if "rgd/mean_loss" in row]
    assert len(rows) == 3
    assert all(set(row) >= {f"rgd/{name}" for name in NAMES} for row in rows)
    for row, plain in zip(rows, module.plain[1::2], strict=True):
        assert row["rgd/mean_loss"] == pytest.approx(plain, rel=1e-6)
        assert 1 <= row["rgd/effective_sample_size"] <= 8
        assert row["rgd/objective"] > row["rgd/mean_loss"]


def test_statistics_are_computed_at_logged_steps_alone(monkeypatch):
    calls = []
    stats = RGDLoss.stats
    monkeypatch.setattr(RGDLoss, "stats", lambda self: calls.append(1) or stats(self))
    fit(Classifier(ce=RGDLoss()), RGDStats(), logger=Recorder(), log_every_n_steps=3)
    assert len(calls) == 2


def test_several_losses_are_logged_by_their_names():
    logger = Recorder()
    fit(Classifier(head=RGDLoss(), tail=RGDLoss(tau=2.0)), RGDStats(prefix="weights"), logger=logger)
    names = set().union(*(row for _, row in logger.rows))
    assert {"weights/criteria.head/mean_loss", "weights/criteria.tail/mean_loss"} <= names


def test_a_module_without_rgd_loss_is_refused_with_a_hint():
    with pytest.raises(ValueError, match=r"Classifier has no RGDLoss.*self\.criterion = RGDLoss\(\)"):
        fit(Classifier(ce=nn.CrossEntropyLoss()), RGDStats())


def test_a_loss_that_was_not_called_is_left_out():
    module = Classifier(ce=RGDLoss())
    module.unused = RGDLoss()
    logger = Recorder()
    fit(module, RGDStats(), logger=logger)
    names = set().union(*(row for _, row in logger.rows))
    assert "rgd/criteria.ce/mean_loss" in names
    assert not any("unused" in name for name in names)


def test_the_wrapper_trains_in_manual_optimization():
    class Manual(Classifier):
        automatic_optimization = False

        def training_step(self, batch, _):
            inputs, target = batch
            optimizer = self.optimizers()
            optimizer.zero_grad()
            optimizer.backward(F.cross_entropy(self.model(inputs), target, reduction="none"))
            optimizer.step()

        def configure_optimizers(self):
            return RGD(super().configure_optimizers())

    module, twin = Manual(), Classifier(ce=RGDLoss())
    fit(module)
    fit(twin)
    for p, q in zip(module.model.parameters(), twin.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def test_a_weighting_set_on_either_of_the_wrapper_and_lightnings_copy_holds_for_both():
    raw = []
    used = []

    class Manual(Classifier):
        automatic_optimization = False

        def training_step(self, batch, _):
            optimizer = self.optimizers()
            if len(used) == 2:
                optimizer.weighting = rgd.CVaR(0.5)
            else:
                raw[0].weighting = rgd.KL(tau=2.0 + len(used))
            losses = F.cross_entropy(self.model(batch[0]), batch[1], reduction="none")
            optimizer.zero_grad()
            objective = optimizer.backward(losses)
            used.append(raw[0].weighting)
            torch.testing.assert_close(objective, reweighted_mean(losses.detach(), used[-1]))
            optimizer.step()

        def configure_optimizers(self):
            raw.append(RGD(super().configure_optimizers()))
            return raw[0]

    fit(Manual())
    assert used[:3] == [rgd.KL(2.0), rgd.KL(3.0), rgd.CVaR(0.5)]


def test_a_manual_step_without_losses_is_refused():
    class Forgetful(Classifier):
        automatic_optimization = False

        def training_step(self, batch, _):
            self.optimizers().step()

        def configure_optimizers(self):
            return RGD(super().configure_optimizers())

    with pytest.raises(TypeError, match=r"closure returned None.*backward\(losses\)"):
        fit(Forgetful(ce=RGDLoss()))


def test_the_wrapper_refuses_automatic_optimization_with_a_hint():
    class Wrong(Classifier):
        def configure_optimizers(self):
            return RGD(super().configure_optimizers())

    with pytest.raises(ValueError, match="automatic optimization"):
        fit(Wrong(ce=RGDLoss()))


class Windows(torch.utils.data.IterableDataset):
    """Micro-batches of several sizes, each with what its window of micro-batches divides by."""

    def __init__(self, sizes, accumulate):
        inputs, target = loader(1, sum(sizes)).dataset.tensors
        batches = list(zip(inputs.split(sizes), target.split(sizes), strict=True))
        self.windows = [batches[i : i + accumulate] for i in range(0, len(sizes), accumulate)]
        self.accumulate = accumulate

    def __iter__(self):
        for window in self.windows:
            total = count_targets(window) / self.accumulate  # Lightning divides every loss by that
            for inputs, target in window:
                yield inputs, target, total


class InWindows(Classifier):
    def training_step(self, batch, _):
        inputs, target, total = batch
        return self.criteria["ce"](self.model(inputs), target, normalizer=total)


def test_unequal_micro_batches_of_a_window_make_one_step_and_so_do_those_of_the_last_part_of_one(monkeypatch):
    sizes = (9, 2, 5, 1, 7, 3, 4, 2)
    models = []
    for accumulate, given in ((3, sizes), (1, (16, 11, 6))):
        batches = torch.utils.data.DataLoader(Windows(given, accumulate), batch_size=None)
        module = InWindows(ce=RGDLoss())
        with monkeypatch.context() as patched:
            patched.setitem(globals(), "loader", lambda batches=batches: batches)
            fit(module, accumulate_grad_batches=accumulate)
        models.append(module.model)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
