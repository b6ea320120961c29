"""A small GPT trained from scratch for one epoch, plain and re-weighted, by tokens and by sequences.

The text is Python's standard library, sources with their docstrings, which every machine has; `--data FILE`
takes another. Its head and its loss are one `LinearRGDLoss` over the tied embedding: logits of a whole batch
are never made in training.

How the arms are compared:

- Every arm trains on the same sequences in the same order, once each, from the same initial model. Only the
  weights differ: none (ERM), KL, MidrangeKL, or KL with scale -1, which favours tokens that are predicted
  well; each for tokens by their own loss and for sequences by their mean loss.
- Each arm gets its own learning rate: the one of the grid with the best plain validation loss.
- The reported loss and accuracy are unweighted, on held-out texts that were not used for tuning, and so is
  the mean loss of the tenth of the sequences that are predicted worst.

With `--resume FOLDER`, a run that was killed and is started again continues from its last checkpoint and ends
with the same numbers. On several processes, each takes its part of every batch:

    torchrun --standalone --nproc-per-node 2 examples/lm_pretrain.py

With `--reference FILE` the weights compare with a reference model. It is trained first, on clean texts of its
own. Then it scores the training sequences once, into FILE, and the arms select by the excess over these
losses. `--polluted 0.5` shuffles the characters of half of the training sequences, so that there is something
to leave out. A complete FILE is read, and an incomplete one is continued.

Run `python examples/lm_pretrain.py --help` for the settings.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import pathlib
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

import rgd
import torch
import torch.distributed as dist
from rgd.torch import LinearRGDLoss, linear_cross_entropy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

LEARNING_RATES = (0.0003, 0.001, 0.003, 0.01, 0.03)


class Size(NamedTuple):
    """Of the model, its text and its training."""

    classes: int = 1024
    width: int = 64
    layers: int = 2
    heads: int = 4
    length: int = 128
    batch: int = 16
    train_tokens: int = 300_000
    held_out_tokens: int = 50_000


class Run(NamedTuple):
    """One training."""

    arm: str
    learning_rate: float
    seed: int


# --- text ---


def standard_library() -> list[bytes]:
    """The sources of Python's standard library, without its tests, in the order of their names."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    paths = (path for path in root.rglob("*.py") if not left_out & set(path.relative_to(root).parts))
    return [path.read_bytes() for path in sorted(paths)]


def pieces_of(path: pathlib.Path, size: int = 1 << 16) -> list[bytes]:
    """A file in pieces that end with a line, to be told apart as training, validation and test texts."""
    pieces, lines, length = [], [], 0
    for line in path.read_bytes().splitlines(keepends=True):
        lines.append(line)
        length += len(line)
        if length >= size:
            pieces.append(b"".join(lines))
            lines, length = [], 0
    return [*pieces, b"".join(lines)] if lines else pieces


class Tokenizer:
    """A token for each of the commonest words, marks and indentations; other text becomes bytes."""

    _WORD = re.compile(rb" ?\w+| ?[^\w\s]+|\s+")

    def __init__(self, texts: Iterable[bytes], classes: int) -> None:
        if classes < 256:
            raise ValueError(f"the vocabulary holds the 256 bytes: give 256 or more, got {classes}")
        counts = Counter(word for text in texts for word in self._WORD.findall(text))
        common = sorted((word for word in counts if len(word) > 1), key=lambda word: (-counts[word], word))
        self.words = [bytes([byte]) for byte in range(256)] + common[: classes - 256]
        self._ids = {word: i for i, word in enumerate(self.words)}

    def encode(self, text: bytes) -> list[int]:
        found: list[int] = []
        for word in self._WORD.findall(text):
            known = self._ids.get(word)
            found.extend(word if known is None else (known,))
        return found

    def decode(self, ids: Iterable[int]) -> bytes:
        return b"".join(self.words[i] for i in ids)


class Corpus(NamedTuple):
    """Sequences of token ids, shape (n, length), for training, choosing and testing; from different texts."""

    train: Tensor
    validation: Tensor
    test: Tensor
    tokenizer: Tokenizer
    clean: Tensor | None = None
    """Sequences of other texts, for a reference model."""
    reference: Tensor | None = None
    """The losses of that model for `train`, (n, length - 1)."""


def corpus(texts: Sequence[bytes], size: Size, *, polluted: float = 0.0, reference: bool = False) -> Corpus:
    """Texts cut into sequences: a tenth of the texts for validation, a tenth for the test, at random.

    With `reference`, a fifth is set aside for the reference model. The share `polluted` of the training
    sequences has its characters shuffled.
    """
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    parts = [[texts[i] for i in order[0::10]], [texts[i] for i in order[1::10]]]
    first = 4 if reference else 2
    train = [texts[i] for place, i in enumerate(order) if place % 10 >= first]
    tokenizer = Tokenizer(train, size.classes)

    def sequences(texts: Sequence[bytes], tokens: int) -> Tensor:
        ids: list[int] = []
        for text in texts:
            if len(ids) >= tokens:
                break
            ids.extend(tokenizer.encode(text))
        count = min(len(ids), tokens) // size.length
        if not count:
            raise ValueError(
                f"the text has no {size.length} tokens for each of its three parts: give more of it"
            )
        return torch.tensor(ids[: count * size.length]).view(count, size.length)

    validation, test = (sequences(part, size.held_out_tokens) for part in parts)
    data = Corpus(sequences(train, size.train_tokens), validation, test, tokenizer)
    if reference:
        clean = [texts[i] for place, i in enumerate(order) if place % 10 in (2, 3)]
        data = data._replace(clean=sequences(clean, size.train_tokens))
    return data._replace(train=shuffled(data.train, tokenizer, polluted))


def shuffled(sequences: Tensor, tokenizer: Tokenizer, share: float) -> Tensor:
    """Sequences of which a share, drawn at random, has the characters of its text in a random order."""
    if not 0 <= share <= 1:
        raise ValueError(f"the share of polluted sequences must be in [0, 1], got {share}")
    generator, sequences = torch.Generator().manual_seed(0), sequences.clone()
    for row in torch.randperm(len(sequences), generator=generator)[: round(share * len(sequences))].tolist():
        text = tokenizer.decode(sequences[row].tolist())
        text = bytes(text[i] for i in torch.randperm(len(text), generator=generator).tolist())
        # If the shuffled text has fewer tokens than before, more characters are added.
        ids = [*tokenizer.encode(text), *text][: sequences.shape[1]]
        sequences[row] = torch.tensor(ids)
    return sequences


# --- model ---


class Block(nn.Module):
    """Causal attention and a feed-forward layer, each with a residual connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_feedforward = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention_in = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.feedforward = nn.Sequential(
            nn.Linear(width, 4 * width, bias=False), nn.GELU(), nn.Linear(4 * width, width, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        parts = self.attention_in(self.before_attention(x)).view(rows, length, 3, self.heads, -1)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(rows, length, width))
        return x + self.feedforward(self.before_feedforward(x))


class GPT(nn.Module):
    """Token ids (B, T) to hidden states (B, T, width); the embedding is the head as well."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size.classes, size.width)
        self.positions = nn.Embedding(size.length, size.width)
        self.blocks = nn.Sequential(*(Block(size.width, size.heads) for _ in range(size.layers)))
        self.norm = nn.RMSNorm(size.width)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) + self.positions.weight[: ids.shape[1]]
        return self.norm(self.blocks(x))


class Pretraining(nn.Module):
    """A GPT with its loss: token ids (B, T) to the objective."""

    def __init__(self, size: Size, weighting: rgd.Weighting, per: str) -> None:
        super().__init__()
        self.model = GPT(size)
        self.criterion = LinearRGDLoss.tie(self.model.embedding, weighting=weighting, per=per, shift=True)

    def forward(self, ids: Tensor, reference: Tensor | None = None) -> Tensor:
        return self.criterion(self.model(ids), ids, reference=reference)


# --- training ---


def weightings(
    classes: int, tau: float | None = None, scale: float = 1.0
) -> dict[str, tuple[rgd.Weighting, str]]:
    """The arms: a weighting, and whether tokens or sequences are weighted.

    tau is log C unless given: the loss of a fresh model. With a smaller one, every token would weigh the same
    until the model has got below it.
    """
    tau = math.log(classes) if tau is None else tau
    arms: dict[str, tuple[rgd.Weighting, str]] = {"ERM": (rgd.ERM(), "element")}
    for unit, per in (("token", "element"), ("sequence", "sample")):
        arms[f"KL(tau={tau:.2g}), {unit}"] = (rgd.KL(tau), per)
        arms[f"MidrangeKL({scale:g}), {unit}"] = (rgd.MidrangeKL(scale), per)
        arms[f"KL(inf, scale=-1), {unit}"] = (rgd.KL(math.inf, scale=-1.0), per)
    return arms


def against_a_reference(share: float) -> dict[str, tuple[rgd.Weighting, str]]:
    """The arms with a reference model, and two without: `share` is how much of a batch Rho-1 keeps."""
    selection = rgd.Excess(rgd.CVaR(share))
    return {
        "ERM": (rgd.ERM(), "element"),
        f"Rho-1({share:g}), token": (selection, "element"),
        f"Rho-1({share:g}), sequence": (selection, "sample"),
        "KL(scale=-3), sequence": (rgd.KL(scale=-3.0, normalize=True), "sample"),
    }


def optimizer_of(model: nn.Module, learning_rate: float, weight_decay: float = 0.1) -> torch.optim.Optimizer:
    """AdamW, with weight decay on the matrices alone."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95))


def rate_at(step: int, steps: int) -> float:
    """The share of the learning rate at a step: a tenth of the steps up, a cosine down to a tenth."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))


@torch.no_grad()
def evaluate(model: GPT, sequences: Tensor, batch: int = 64) -> dict[str, float]:
    """Plain loss and accuracy of all tokens, and the mean loss of the worst tenth of the sequences."""
    losses, right = [], []
    for ids in sequences.split(batch):
        logits = F.linear(model(ids)[:, :-1], model.embedding.weight).float()
        losses.append(F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1))
        right.append((logits.argmax(-1) == ids[:, 1:]).float().mean(1))
    of_sequences = torch.cat(losses).double()
    worst = of_sequences.topk(max(1, round(len(of_sequences) / 10))).values
    return {
        "loss": of_sequences.mean().item(),
        "accuracy": torch.cat(right).double().mean().item(),
        "worst tenth": worst.mean().item(),
    }


def train(  # noqa: PLR0917
    run: Run,
    size: Size,
    data: Corpus,
    weighting: rgd.Weighting,
    per: str,
    checkpoint: pathlib.Path | None = None,
    every: int = 50,
    tick: Callable[[int], object] = lambda _: None,
) -> dict[str, Any]:
    """One epoch: plain results on the test texts, and the validation loss on the way.

    Args:
        run: Learning rate and seed; the seed sets the initial model and the order of the sequences.
        size: Of the model and the batches.
        data: What is trained on and evaluated on.
        weighting: What turns losses into weights.
        per: "element" for tokens, "sample" for sequences.
        checkpoint: Where to keep the training so far, and to look for it; None for nowhere.
        every: Steps between two checkpoints, and between two evaluations.
        tick: Called with the number of steps done since it was last called.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = torch.device("cuda", rank % torch.cuda.device_count()) if torch.cuda.is_available() else "cpu"
    torch.manual_seed(run.seed)
    pretraining = Pretraining(size, weighting, per).to(device)
    wrapped = DistributedDataParallel(pretraining) if ranks > 1 else pretraining
    optimizer = optimizer_of(pretraining, run.learning_rate)
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(run.seed))
    batches = order[: len(order) - len(order) % size.batch].view(-1, size.batch)
    validation, test = data.validation.to(device), data.test.to(device)

    done, curve = 0, []
    if checkpoint is not None and checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device)
        pretraining.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        done, curve = saved["step"], saved["curve"]
    tick(done)
    for step in range(done, len(batches)):
        for group in optimizer.param_groups:
            group["lr"] = run.learning_rate * rate_at(step, len(batches))
        rows = batches[step].tensor_split(ranks)[rank]
        given = [data.train[rows].to(device)]
        if data.reference is not None and isinstance(weighting, rgd.Excess):
            given.append(data.reference[rows].to(device))
        optimizer.zero_grad()
        wrapped(*given).backward()
        optimizer.step()
        tick(1)
        if (step + 1) % every == 0 or step + 1 == len(batches):
            curve.append(
                [(step + 1) * size.batch * size.length, evaluate(pretraining.model, validation)["loss"]]
            )
            if checkpoint is not None and rank == 0:
                state = {"model": pretraining.state_dict(), "optimizer": optimizer.state_dict()}
                partial = checkpoint.with_suffix(".part")
                torch.save({**state, "step": step + 1, "curve": curve}, partial)
                os.replace(partial, checkpoint)  # a run that is killed here leaves a whole checkpoint
    return {"validation": curve[-1][1], "curve": curve, **evaluate(pretraining.model, test)}


def train_all(  # noqa: PLR0917
    runs: Sequence[Run],
    size: Size,
    data: Corpus,
    arms: dict[str, tuple[rgd.Weighting, str]],
    folder: pathlib.Path | None = None,
    every: int = 50,
) -> dict[Run, dict[str, Any]]:
    """Every run, or what is left of them in a folder that holds results and a checkpoint."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    results: dict[Run, dict[str, Any]] = {}
    finished = None if folder is None else folder / "results.jsonl"
    if folder is not None and finished is not None:
        settings = json.dumps([size, [repr(arm) for arm in arms.values()], data.train.sum().item()])
        marker = folder / "settings.json"
        if rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            if marker.exists() and marker.read_text() != settings:
                raise SystemExit(
                    f"{folder} holds runs of other settings or another text: name another folder"
                )
            marker.write_text(settings)
        if finished.exists():
            for line in finished.read_text().splitlines():
                name, result = json.loads(line)
                results[Run(*name)] = result
        if dist.is_initialized():
            dist.barrier()  # so that all read the same results before one of them adds to these
    steps = len(data.train) // size.batch
    with tqdm(total=steps * len(runs), unit="step", desc="training", smoothing=0.05, disable=rank > 0) as bar:
        for number, run in enumerate(runs):
            bar.set_postfix_str(f"{number + 1}/{len(runs)}: {run.arm}, rate {run.learning_rate:g}")
            name = re.sub(r"[^\w.=-]+", "_", "_".join(map(str, run)))
            checkpoint = None if folder is None else folder / f"{name}.pt"
            if run in results:
                if rank == 0 and checkpoint is not None:
                    # The checkpoint still exists if the program was killed right after writing the result.
                    checkpoint.unlink(missing_ok=True)
                bar.update(steps)
                continue
            results[run] = train(run, size, data, *arms[run.arm], checkpoint, every, bar.update)
            if rank == 0 and finished is not None and checkpoint is not None:
                with finished.open("a") as file:
                    file.write(json.dumps([run, results[run]]) + "\n")
                checkpoint.unlink(missing_ok=True)
    return results


# --- the reference model ---


def reference_losses(  # noqa: PLR0917
    file: pathlib.Path, size: Size, data: Corpus, learning_rate: float, every: int = 50, batch: int = 64
) -> Tensor:
    """The losses of a reference model for the training sequences, from a file or into it.

    An existing file is read. Otherwise the model is trained on `data.clean`, and scores the sequences into a
    file with the ending `.part`, which is renamed when it is complete. Both continue where they were stopped.
    """
    clean, shape = cast("Tensor", data.clean), (len(data.train), data.train.shape[1] - 1)
    settings = json.dumps([size, learning_rate, clean.sum().item(), hash_of(data.train)])
    marker, part = (file.with_name(file.name + ending) for ending in (".json", ".part"))
    first = not dist.is_initialized() or dist.get_rank() == 0
    if marker.exists() and marker.read_text() != settings:
        raise SystemExit(f"{file} holds losses of another text or model: name another file")
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        if first:
            marker.write_text(settings)
        checkpoint = file.with_name(file.name + ".pt")
        steps = len(clean) // size.batch
        with tqdm(total=steps, unit="step", desc="reference", disable=not first) as bar:
            own = data._replace(train=clean, reference=None)
            run = Run("reference", learning_rate, 0)
            train(run, size, own, rgd.ERM(), "element", checkpoint, every, bar.update)
        if dist.is_initialized():
            dist.barrier()  # so that the last checkpoint is there
        if first:
            pretraining = Pretraining(size, rgd.ERM(), "element")
            pretraining.load_state_dict(torch.load(checkpoint, map_location="cpu")["model"])
            score(pretraining.model, data.train, part, batch)
            os.replace(part, file)
            checkpoint.unlink()
        if dist.is_initialized():
            dist.barrier()
    losses = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.float32)
    if losses.numel() != shape[0] * shape[1]:
        raise SystemExit(f"{file} holds {losses.numel():,} losses, not those of {shape}: name another file")
    return losses.view(shape)


def hash_of(sequences: Tensor) -> str:
    return hashlib.sha256(sequences.numpy().tobytes()).hexdigest()


@torch.no_grad()
def score(model: GPT, sequences: Tensor, part: pathlib.Path, batch: int) -> None:
    """Append the losses of the sequences, float32, that the file does not have yet."""
    size = 4 * (sequences.shape[1] - 1)
    done = part.stat().st_size // size if part.exists() else 0
    with (
        part.open("ab") as out,
        tqdm(total=len(sequences), initial=done, unit="sequence", desc="scoring") as bar,
    ):
        out.truncate(done * size)  # a run that was killed may have written a part of a sequence
        for ids in sequences[done:].split(batch):
            losses = linear_cross_entropy(
                model(ids), model.embedding.weight, ids, weighting=rgd.ERM(), reduction="none", shift=True
            )
            out.write(losses.float().numpy().tobytes())
            out.flush()
            bar.update(len(ids))


# --- report ---


class Row(NamedTuple):
    """An arm at the learning rate that validation chose, means over the seeds."""

    arm: str
    learning_rate: float
    validation: float
    loss: float
    accuracy: float
    worst: float
    curve: list[list[float]]


def rows_of(results: dict[Run, dict[str, Any]]) -> list[Row]:
    """One row an arm, in the order of the runs."""
    chosen: dict[str, Row] = {}
    for run in results:
        same = [r for other, r in results.items() if other[:2] == run[:2]]
        mean = [
            sum(r[name] for r in same) / len(same)
            for name in ("validation", "loss", "accuracy", "worst tenth")
        ]
        curve = torch.tensor([r["curve"] for r in same], dtype=torch.float64).mean(0).tolist()
        row = Row(run.arm, run.learning_rate, *mean, curve)
        best = chosen.get(run.arm)
        # A validation loss that is not finite is worse than every other.
        if best is None or row.validation < best.validation or math.isnan(best.validation):
            chosen[run.arm] = row
    return list(chosen.values())


def at_the_edge(rows: Sequence[Row], rates: Sequence[float]) -> list[str]:
    """The arms whose best rate ends the grid, so that a wider one might be better for them."""
    return [row.arm for row in rows if len(rates) > 1 and row.learning_rate in (min(rates), max(rates))]


def table(rows: Sequence[Row]) -> str:
    lines = [f"{'':<28} {'rate':>6} {'validation':>11} {'test loss':>10} {'accuracy':>9} {'worst tenth':>12}"]
    for r in rows:
        numbers = f"{r.validation:>11.3f} {r.loss:>10.3f} {r.accuracy:>9.1%} {r.worst:>12.3f}"
        lines.append(f"{r.arm:<28} {r.learning_rate:>6g} {numbers}")
    return "\n".join(lines)


def picture(rows: Sequence[Row], path: pathlib.Path) -> None:
    """Validation loss against tokens seen, and loss and worst tenth on the test texts, arm by arm."""
    import matplotlib as mpl  # noqa: PLC0415

    mpl.use("agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415

    figure, (curves, ends) = plt.subplots(
        1, 2, figsize=(11, 5.4), layout="constrained", width_ratios=(1.15, 1)
    )
    base = rows[0]
    for place, row in enumerate(rows):
        color = f"C{place}"
        tokens, losses = zip(*row.curve, strict=True)
        style = "-" if place == 0 else "--" if row.arm.endswith("token") else ":"
        curves.plot([t / 1e3 for t in tokens], losses, style, color=color, label=row.arm)
        ends.plot(row.loss - base.loss, place, "o", color=color)
        ends.plot(row.worst - base.worst, place, "^", color=color)
    curves.set_xlabel("thousand tokens seen")
    curves.set_ylabel("plain validation loss, nats a token")
    curves.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
    ends.axvline(0, color="0.8", zorder=0)
    ends.set_yticks(range(len(rows)), [row.arm for row in rows], fontsize=9)
    ends.invert_yaxis()
    ends.set_xlabel(f"difference to {base.arm}, nats: ● test loss, ▲ worst tenth")
    for axes in (curves, ends):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        "A small GPT, one epoch, learning rate chosen for each arm", x=0.01, ha="left", fontsize=12
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    usual = Size()
    parser = argparse.ArgumentParser(description="A small GPT from scratch, plain and re-weighted")
    parser.add_argument("--data", type=pathlib.Path, help="a text file (default: Python's standard library)")
    parser.add_argument(
        "--tau", type=float, help="clipping factor of the KL arms (default: log of the vocabulary)"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="scale of the MidrangeKL arms (default: 1)")
    parser.add_argument(
        "--rates", type=float, nargs="+", default=LEARNING_RATES, help="learning rates to choose from"
    )
    parser.add_argument("--seeds", type=int, default=1, help="runs of each kind (default: 1)")
    parser.add_argument(
        "--quick", action="store_true", help="a smoke test: a tiny model, few tokens, one rate"
    )
    parser.add_argument(
        "--resume", type=pathlib.Path, help="folder for checkpoints, to go on from when started again"
    )
    parser.add_argument(
        "--reference",
        type=pathlib.Path,
        help="a file of a reference model's losses, made where it is missing",
    )
    parser.add_argument(
        "--polluted", type=float, default=0.0, help="share of training sequences to shuffle (default: 0)"
    )
    parser.add_argument("--share", type=float, default=0.5, help="what Rho-1 keeps of a batch (default: 0.5)")
    parser.add_argument("--threads", type=int, help="threads of torch (default: its own choice)")
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path(__file__).with_suffix(".png"), help="the picture"
    )
    for name, value in usual._asdict().items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"(default: {value})")
    options = parser.parse_args(arguments)
    size = Size(320, 16, 1, 2, 32, 8, 4_000, 2_000) if options.quick else usual
    given = {name: getattr(options, name) for name in usual._fields}
    size = size._replace(**{name: value for name, value in given.items() if value is not None})
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group()
    first = not dist.is_initialized() or dist.get_rank() == 0

    texts = standard_library() if options.data is None else pieces_of(options.data)
    every, compares = 5 if options.quick else 50, options.reference is not None
    data = corpus(texts, size, polluted=options.polluted, reference=compares)
    if compares:
        losses = reference_losses(options.reference, size, data, 0.01, every)
        data, arms = data._replace(reference=losses), against_a_reference(options.share)
    else:
        arms = weightings(size.classes, options.tau, options.scale)
    rates = (0.003,) if options.quick else options.rates
    runs = [Run(arm, rate, seed) for arm in arms for rate in rates for seed in range(options.seeds)]
    if first:
        parameters = sum(p.numel() for p in GPT(size).parameters())
        print(
            f"{len(runs)} trainings of {data.train.numel():,} tokens: {len(arms)} arms, {len(rates)} rates, "
            f"{options.seeds} seeds;\n{parameters:,} parameters, {size.classes} classes",
            flush=True,
        )
    rows = rows_of(train_all(runs, size, data, arms, options.resume, every))
    if first:
        print(table(rows))
        print("\nPlain losses in nats a token. 'rate' is the learning rate of the best validation loss.")
        print("Test loss, accuracy and the loss of the worst tenth of the sequences are of texts that were")
        print("not used for tuning.")
        for arm in at_the_edge(rows, options.rates):
            print(f"\n{arm}: the best rate ends the grid; give wider --rates before you compare it.")
        picture(rows, options.output)
        print(f"\nPicture: {options.output}")
    if dist.is_initialized():
        dist.destroy_process_group()
    return cast("list[Row]", rows)


if __name__ == "__main__":
    main()
