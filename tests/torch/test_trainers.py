"""One training of the handwritten digits, by every road: the same parameters where they must be the same.

The plain loop with the formula composed from torch operations is the yardstick. DistributedDataParallel is in
test_distributed.py.
"""

import warnings

import numpy as np
import pytest
import torch
from rgd.torch import RGD, RGDLoss, cross_entropy, reweighted_mean
from torch import nn
from torch.nn import functional as F

datasets = pytest.importorskip("sklearn.datasets")

BATCH, STEPS, RATE = 64, 60, 0.3
# Each step rounds parameters, which are below 1, and their updates, sums in another order, to about 2^-23.
CLOSE = {"rtol": 0.0, "atol": STEPS * 2**-23}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # models this small gain nothing from more
    yield
    torch.set_num_threads(threads)


def load():
    images, labels = datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images, labels = torch.tensor(images[order] / 16, dtype=torch.float32), torch.tensor(labels[order])
    return (images[:1400], labels[:1400]), (images[1400:], labels[1400:])


@pytest.fixture(scope="module")
def digits():
    return load()


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def indices():
    return torch.arange(STEPS * BATCH).remainder(1400).split(BATCH)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=RATE)


def composed(logits, target):
    losses = F.cross_entropy(logits, target, reduction="none")
    return (torch.exp(losses.detach().clamp(max=1.0) / 2) * losses).mean()


def train(criterion, digits, model=None):
    (images, labels), _ = digits
    model = make_model() if model is None else model
    optimizer = sgd(model)
    for i in indices():
        optimizer.zero_grad()
        criterion(model(images[i]), labels[i]).backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def yardstick(digits):
    return train(composed, digits)


def assert_same(model, yardstick):
    for p, q in zip(model.parameters(), yardstick.parameters(), strict=True):
        torch.testing.assert_close(p, q, **CLOSE)


def accuracy(model, digits):
    _, (images, labels) = digits
    with torch.no_grad():
        return (model(images).argmax(1) == labels).double().mean().item()


def test_the_yardstick_learns(yardstick, digits):
    assert accuracy(yardstick, digits) > 0.9


def losses_of(logits, target):
    return F.cross_entropy(logits, target, reduction="none")


@pytest.mark.parametrize(
    "criterion",
    [
        RGDLoss(),
        cross_entropy,
        RGDLoss(base=nn.CrossEntropyLoss(reduction="none")),
        lambda logits, target: reweighted_mean(losses_of(logits, target)),
    ],
    ids=["RGDLoss", "cross_entropy", "RGDLoss with base", "reweighted_mean"],
)
def test_plain_loop(criterion, yardstick, digits):
    assert_same(train(criterion, digits), yardstick)


def test_optimizer_wrapper(yardstick, digits):
    (images, labels), _ = digits
    model = make_model()
    optimizer = RGD(sgd(model))
    for i in indices():
        optimizer.zero_grad()
        optimizer.backward(losses_of(model(images[i]), labels[i]))
        optimizer.step()
    assert_same(model, yardstick)


def test_optimizer_wrapper_with_closures(yardstick, digits):
    (images, labels), _ = digits
    model = make_model()
    optimizer = RGD(sgd(model))
    for i in indices():
        optimizer.step(lambda i=i: losses_of(model(images[i]), labels[i]))
    assert_same(model, yardstick)


def test_gradient_accumulation(yardstick, digits):
    (images, labels), _ = digits
    model, criterion = make_model(), RGDLoss()
    optimizer = sgd(model)
    for i in indices():
        optimizer.zero_grad()
        for part in i.chunk(4):
            (criterion(model(images[part]), labels[part]) / 4).backward()
        optimizer.step()
    assert_same(model, yardstick)


@pytest.mark.parametrize("what", ["the loss", "loss and model"])
def test_torch_compile(what, yardstick, digits):
    criterion, model = RGDLoss(), make_model()
    if what == "the loss":
        criterion = torch.compile(criterion, backend="aot_eager", fullgraph=True)
        # Dynamo asks logits, which are no leaf, for their gradient, and warns itself.
        assert_same(quietly(train, criterion, digits, model), yardstick)
        return
    step = torch.compile(lambda x, y: criterion(model(x), y), backend="aot_eager", fullgraph=True)
    (images, labels), _ = digits
    optimizer = sgd(model)
    for i in indices():
        optimizer.zero_grad()
        step(images[i], labels[i]).backward()
        optimizer.step()
    assert_same(model, yardstick)


def test_autocast_reaches_the_same_accuracy(yardstick, digits):
    criterion, model = RGDLoss(), make_model()

    def forward(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x)

    (images, labels), _ = digits
    optimizer = sgd(model)
    for i in indices():
        optimizer.zero_grad()
        criterion(forward(images[i]), labels[i]).backward()
        optimizer.step()
    assert accuracy(model, digits) == pytest.approx(accuracy(yardstick, digits), abs=0.02)


def quietly(function, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the trainers' own dependencies warn of
        return function(*args, **kwargs)


class Batches(torch.utils.data.Dataset):
    """One row after another, as the plain loop takes them."""

    def __init__(self, digits):
        (self.images, self.labels), _ = digits

    def __len__(self):
        return STEPS * BATCH

    def __getitem__(self, index):
        index %= 1400
        return {"inputs": self.images[index], "labels": self.labels[index]}


def test_hugging_face_trainer(yardstick, digits, tmp_path):
    transformers = quietly(pytest.importorskip, "transformers")
    pytest.importorskip("accelerate")
    from rgd.integrations.transformers import rgd_loss_func  # noqa: PLC0415

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = make_model()

        def forward(self, inputs):
            return {"logits": self.model(inputs)}

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    def fit():
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=STEPS,
            per_device_train_batch_size=BATCH // 2,
            gradient_accumulation_steps=2,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            optim="sgd",
            max_grad_norm=0.0,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
        )
        model = Wrapped()
        InOrder(model, arguments, train_dataset=Batches(digits), compute_loss_func=rgd_loss_func()).train()
        return model

    transformers.utils.logging.set_verbosity_error()
    assert_same(quietly(fit).model, yardstick)


def test_lightning(yardstick, digits):
    pl = quietly(pytest.importorskip, "lightning.pytorch")

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.criterion = make_model(), RGDLoss()

        def training_step(self, batch, _):
            return self.criterion(self.model(batch["inputs"]), batch["labels"])

        def configure_optimizers(self):
            return sgd(self)

    def fit():
        module = Module()
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, torch.utils.data.DataLoader(Batches(digits), batch_size=BATCH))
        return module

    assert_same(quietly(fit).model, yardstick)


# --- what other training scripts hand to a loss ---


def mixed(images, labels, generator):
    """Mixup as timm does it: images and one-hot labels mixed with the batch reversed."""
    share = float(torch.rand((), generator=generator))
    soft = F.one_hot(labels, 10).float()
    return share * images + (1 - share) * images.flip(0), share * soft + (1 - share) * soft.flip(0)


def test_mixups_soft_targets_need_nothing_special(digits):
    (images, labels), _ = digits
    models = []
    for criterion in (RGDLoss(label_smoothing=0.1), None):
        model, generator = make_model(), torch.Generator().manual_seed(3)
        optimizer = sgd(model)
        for i in indices():
            x, soft = mixed(images[i], labels[i], generator)
            optimizer.zero_grad()
            if criterion is not None:
                criterion(model(x), soft).backward()
            else:
                losses = F.cross_entropy(model(x), soft, label_smoothing=0.1, reduction="none")
                (torch.exp(losses.detach().clamp(max=1.0) / 2) * losses).mean().backward()
            optimizer.step()
        models.append(model)
    assert_same(*models)
    assert accuracy(models[0], digits) > 0.85


def test_metrics_of_a_running_mean_are_those_of_the_plain_loss(digits):
    (images, labels), _ = digits
    model, criterion = make_model(), RGDLoss(evaluate="weighted")
    total = count = 0.0
    with torch.no_grad():
        for i in torch.arange(1400).split(BATCH):
            criterion(model(images[i]), labels[i])
            stats = criterion.stats()
            total, count = total + stats.mean_loss * stats.count, count + stats.count
        expected = F.cross_entropy(model(images), labels).item()
    assert count == 1400
    assert total / count == pytest.approx(expected, rel=1e-5)
