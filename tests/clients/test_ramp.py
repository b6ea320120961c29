"""The ramps of docs/clients.md: the scale falls from 0 to -1 by half-time, in a resumed run too."""

import pathlib
import re
import warnings

import pytest
import rgd
import torch
from rgd.torch import RGDLoss, WeightingSchedule
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore")  # what the clients and their dependencies warn of

DOCS = pathlib.Path(__file__).parents[2] / "docs"
STEPS, ACCUMULATED, BATCH = 12, 2, 4


def names_of(title):
    """What the second block of a section of docs/clients.md, the ramp, defines."""
    page = (DOCS / "clients.md").read_text(encoding="utf-8")
    section = re.search(rf"^## {title}$(.*?)^## ", page, re.MULTILINE | re.DOTALL)[1]
    _, code = re.findall(r"^```py\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    assert "class Ramp(" in code
    assert code.count("\n") <= 12
    exec(code, names := {})
    return names


def scales_of_the_recipe():
    """The scale of each step, by the recipe for a loop of one's own in docs/torch.md."""
    page = (DOCS / "torch.md").read_text(encoding="utf-8")
    (line,) = re.findall(
        r"^schedule = WeightingSchedule\(criterion, lambda t: .*scale=-.*$", page, re.MULTILINE
    )
    names = {"rgd": rgd, "WeightingSchedule": WeightingSchedule, "criterion": RGDLoss(), "T": STEPS}
    exec(line, names)
    scales = [names["criterion"].weighting.scale]
    for _ in range(STEPS - 1):
        names["schedule"].step()
        scales.append(names["criterion"].weighting.scale)
    return scales


def test_the_recipe_starts_plain_and_reaches_minus_one_at_half_time():
    scales = scales_of_the_recipe()
    assert scales[0] == 0
    assert scales[STEPS // 2 :] == [-1.0] * (STEPS // 2)
    assert scales == sorted(scales, reverse=True)


class Scales(nn.Module):
    """A linear model that notes the scale of each of its training batches."""

    def __init__(self, weighting):
        super().__init__()
        self.linear, self.weighting, self.seen = nn.Linear(5, 3), weighting, []

    def forward(self, inputs, labels=None):  # the Trainer asks for the name
        self.seen.append(self.weighting().scale)
        return {"logits": self.linear(inputs)}


def rows(steps):
    count = steps * ACCUMULATED * BATCH
    inputs = torch.randn(count, 5, generator=torch.Generator().manual_seed(0))
    return [{"inputs": x, "labels": k % 3} for k, x in enumerate(inputs)]


def by_micro_batch(scales):
    return [scale for scale in scales for _ in range(ACCUMULATED)]


@pytest.mark.usefixtures("one_thread")
def test_the_trainer_turns_the_scale_at_each_optimizer_step_and_goes_on_after_a_resumption(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers")
        pytest.importorskip("accelerate")
    names = names_of("transformers")

    def train(resume):
        names["loss_func"].weighting = rgd.KL(scale=0.0)
        model = Scales(lambda: names["loss_func"].weighting)
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=STEPS, per_device_train_batch_size=BATCH, save_steps=STEPS // 3,
            gradient_accumulation_steps=ACCUMULATED, use_cpu=True, report_to=[], disable_tqdm=True,
        )  # fmt: skip
        trainer = transformers.Trainer(
            model, arguments, train_dataset=rows(STEPS), compute_loss_func=names["loss_func"],
            callbacks=[names["Ramp"]()],
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return model.seen

    expected = by_micro_batch(scales_of_the_recipe())
    assert train(None) == expected
    assert train(str(tmp_path / f"checkpoint-{STEPS // 3}")) == expected[STEPS // 3 * ACCUMULATED :]


@pytest.mark.usefixtures("one_thread")
def test_lightning_turns_the_scale_at_each_optimizer_step_and_goes_on_after_a_resumption(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pl = pytest.importorskip("lightning.pytorch")
    ramp = names_of("Lightning")["Ramp"]
    epochs = 3

    class Classifier(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.criterion = RGDLoss()
            self.model = Scales(lambda: self.criterion.weighting)

        def training_step(self, batch, _):
            return self.criterion(self.model(batch["inputs"])["logits"], batch["labels"])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def train(resume):
        module = Classifier()
        checkpoints = pl.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        trainer = pl.Trainer(
            max_epochs=epochs, accumulate_grad_batches=ACCUMULATED, callbacks=[ramp(), checkpoints],
            accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(
            module, torch.utils.data.DataLoader(rows(STEPS // epochs), batch_size=BATCH), ckpt_path=resume
        )
        return module.model.seen

    expected = by_micro_batch(scales_of_the_recipe())
    assert train(None) == expected
    assert train(str(tmp_path / "epoch=0.ckpt")) == expected[STEPS // epochs * ACCUMULATED :]
