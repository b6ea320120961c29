"""The evidence program on texts reads them, trains the top of a BERT, and compares as it says."""

import importlib
import pathlib
import sys

import numpy as np
import pytest
import rgd
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples" / "evidence"))

from harness import Arm, Cell

text = importlib.import_module("text")


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(rows) + "\n")


# --- what is read ---


def test_one_package_of_each_source_is_taken_with_the_end_of_its_section():
    blocks = [f"Package: p{k}\nSection: contrib/games\nDescription: game {k}\n more" for k in range(60)]
    blocks += [
        "Package: p0-data\nSource: p0 (1.2)\nSection: games\nDescription: again",
        "Package: x\nSection: net",
    ]
    rows = text.debian("\n\n".join(blocks))
    assert sorted(rows.first) == sorted(f"game {k}" for k in range(60))
    assert set(rows.labels) == {"games"}


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A standard library in small; every module counts."""
    monkeypatch.setitem(text.LEAST, text.DOCSTRINGS, 1)

    def file(name, *docstrings):
        """With docstrings of the module, a class, its method and a function in that."""
        lines: list[str] = []
        kinds = ("", "class C:", "def f(self):", "async def g():")
        for k, (kind, docstring) in enumerate(zip(kinds, docstrings, strict=False)):
            lines += ["    " * (k - 1) + kind, "    " * k + f'"""{docstring}"""']
        write(tmp_path / name, lines)

    file(
        "mail.py",
        "Module that sends e-mail.\n\nMore of it here.",
        "A\n  class of mails.",
        "Opens a box.",
        "x y",
    )
    file("web/__init__.py", "The web: all about pages.", "Gets a page now.")
    file("web/page.py", "Gets a page now.", "Shared by both modules.")
    file("zip.py", "Shared by both modules.", "")
    write(tmp_path / "old.py", ['"""Of an old Python."""', "print 'x'"])
    for left_out in ("test/a.py", "web/tests/b.py", "web/test_page.py", "idle/idle_test/c.py"):
        file(left_out, "This tests some things.")
    file("site-packages/numpy.py", "Not of the library.")
    return tmp_path


def test_first_paragraphs_of_modules_classes_and_functions_are_read_each_once(library):
    rows = text.docstrings(library)
    assert sorted(zip(rows.labels, rows.first, strict=True)) == [
        ("mail", "A class of mails."),
        ("mail", "Module that sends e- ."),
        ("web", "Gets a page now."),
        ("web", "The : all about pages."),
    ]
    assert set(rows.second) == {""}


def test_a_module_with_few_docstrings_is_left_out(library, monkeypatch):
    monkeypatch.setitem(text.LEAST, text.DOCSTRINGS, 3)
    assert text.docstrings(library).labels == []


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("email", "Parse an Email, as email.parser does.", "Parse an , as .parser does."),
        ("email", "Emails of my_email_box", "Emails of my_ _box"),
        ("_pyio", "As pyio and _pyio\n  do; Opyio", "As and _ do; Opyio"),
        ("a.b", "a.b and axb", "and axb"),
    ],
)
def test_the_name_of_the_module_is_taken_out_of_the_text(name, before, after):
    assert text.without(name, before) == after


HEADERS = {
    "sst2": ("sentence\tlabel", "{a}\t{y}"),
    "mrpc": ("Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", "{y}\t1\t2\t{a}\t{b}"),
    "qqp": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "0\t1\t2\t{a}\t{b}\t{y}"),
    "mnli": ("index\tpromptID\tsentence1\tsentence2\tlabel1\tgold_label", "0\t1\t{a}\t{b}\t{y}\t{y}"),
    "qnli": ("index\tquestion\tsentence\tlabel", "0\t{a}\t{b}\t{y}"),
    "rte": ("index\tsentence1\tsentence2\tlabel", "0\t{a}\t{b}\t{y}"),
    "wnli": ("index\tsentence1\tsentence2\tlabel", "0\t{a}\t{b}\t{y}"),
    "cola": ("", "gj04\t{y}\t\t{a}"),
}


def glue_folder(folder, task, rows):
    """Files in GLUE's layout: rows of two sentences and a label, all but the last 64 to train."""
    header, form = HEADERS[task]
    lines = [form.format(a=a, b=b, y=y) for a, b, y in rows]
    dev = "dev_matched" if task == "mnli" else "dev"
    for part, some in (("train", lines[:-64]), (dev, lines[-64:])):
        write(folder / text.GLUE[task][0] / f"{part}.tsv", ([header] if header else []) + some)


@pytest.mark.parametrize("task", text.GLUE)
def test_the_files_of_glue_are_read(task, tmp_path):
    rows = [(f'first "{k}', f"second {k}", str(k % 2)) for k in range(70)]
    glue_folder(tmp_path, task, rows)
    got = text.glue(tmp_path, task)
    assert got.training == 6
    second = [b if text.GLUE[task][2] else "" for _, b, _ in rows]
    expected = list(zip([a for a, _, _ in rows], second, [y for _, _, y in rows], strict=True))
    found = list(zip(got.first, got.second, got.labels, strict=True))
    assert sorted(found[:6]) == sorted(expected[:6])
    assert sorted(found[6:]) == sorted(expected[6:])


def test_a_missing_file_of_glue_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"SST-2/train\.tsv"):
        text.glue(tmp_path, "sst2")


# --- the network ---


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The folder of a tiny network, and what apt would say."""
    folder = tmp_path_factory.mktemp("tiny")
    return folder, text.pretended(folder)[0]


def test_frozen_layers_and_top_layer_together_are_the_whole_network(tiny, tmp_path):
    from transformers import BertConfig, BertModel  # noqa: PLC0415

    torch.manual_seed(0)
    # Larger weights than a fresh network's, with which a layer is hardly more than its residual.
    config = BertConfig.from_pretrained(tiny[0], initializer_range=0.5)
    whole = BertModel(config, add_pooling_layer=False).eval()
    for name, parameter in whole.named_parameters():
        if name.endswith("bias"):  # a fresh network's are 0
            torch.nn.init.normal_(parameter, std=0.5)
    whole.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((tiny[0] / "tokenizer.json").read_bytes())
    bert, rows = text.load(tmp_path), text.debian(tiny[1])
    data = text.corpus(text.Rows(rows.first[:8], rows.second[:8], rows.labels[:8]), bert, 16)
    with torch.no_grad():
        for k in range(8):
            ids = torch.tensor([bert.tokenizer.encode(rows.first[k]).ids])
            out = whole(input_ids=ids, output_hidden_states=True)
            below, expected = out.hidden_states[1], out.last_hidden_state[0, 0]
            kept = data.features[k, : ids.shape[1]].float()
            # Kept in float16: half a unit in the last place of numbers below 4.
            assert torch.allclose(kept, below[0], rtol=0, atol=2 * torch.finfo(torch.float16).eps)
            padded = torch.nn.functional.pad(below, (0, 0, 0, 3), value=9.0)
            mask = torch.arange(padded.shape[1])[None] < ids.shape[1]
            got = text.top_layer(bert.top, padded, mask, bert.heads)[0]
            # Some hundred additions, and layer norms, of numbers of about 1.
            assert torch.allclose(got, expected, rtol=0, atol=500 * torch.finfo(torch.float32).eps)
            assert (got - below[0, 0]).abs().max() > 0.1


def test_runs_of_other_texts_are_not_taken_for_those_of_these(tiny):
    bert, keys = text.load(tiny[0]), set()
    for word in ("word1", "word2"):
        data = text.corpus(text.Rows([word, "word3"], ["", ""], ["a", "b"]), bert, text.GLUE_TOKENS)
        keys.add(text.Text("same", lambda seed: None, 16, 2, corpus=data).key())
    assert len(keys) == 2


def test_glue_trains_on_its_training_rows_and_tests_on_the_others(tiny, tmp_path):
    glue_folder(tmp_path, "rte", [(f"word{k % 30}", f"word{k % 7}", str(k % 2)) for k in range(200)])
    data = text.corpus(text.glue(tmp_path, "rte"), text.load(tiny[0]), text.GLUE_TOKENS)
    drawn = text.draw(0, data, (64, 32, 64))
    assert max(drawn.train.inputs.max(), drawn.validation.inputs.max()) < 136 <= drawn.test.inputs.min()
    problem = text.Text(
        "rte", lambda seed: text.draw(seed, data, (64, 32, 64)), 16, 2, (), 1, 32, corpus=data
    )
    (outcome,) = text.fine_tune(problem, Arm("rgd", rgd.KL(1.0)), [0], [Cell(1e-3, 0.01)], ())[
        0, Cell(1e-3, 0.01)
    ]
    assert 1 < outcome.mean_weight < np.e
    assert np.isfinite(outcome.test["mean_loss"])


def test_a_task_of_glue_has_a_command_and_a_folder_of_its_own_unless_another_is_named(monkeypatch):
    seen = []
    monkeypatch.setattr(text, "main", lambda row, arguments: seen.append((row, arguments)))
    text.command_line(["--task", "rte", "--folder", "x", "--full"])
    text.command_line(["--task", "rte", "--folder", "x", "--quick", "--output", "y"])
    (full, arguments), (_, quick) = seen
    assert full.options == " --task rte"
    assert full.run.keywords == {"task": "rte", "folder": pathlib.Path("x")}
    assert pathlib.Path(arguments[1]).parts[-2:] == ("results", "rte")
    assert pathlib.Path(quick[1]).parts[-3:] == ("results", "quick", "rte")
    assert quick[-2:] == ["--output", "y"], "what the user names comes last, and wins"
