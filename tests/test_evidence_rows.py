"""The evidence programs on text and images read their data, train and compare as they say."""

import importlib
import pathlib
import sys

import numpy as np
import pytest
import rgd
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples" / "evidence"))

from harness import Arm, Cell, Grid

text, vit = map(importlib.import_module, ("text", "vit"))


# --- the grid ---


def test_a_grid_of_one_axis_holds_the_decay():
    grid = Grid((0.1, 0.2), (0.01,), one_axis=True)
    assert grid.grown(Cell(0.2, 0.01)).cells() == [Cell(0.1, 0.01), Cell(0.2, 0.01), Cell(0.4, 0.01)]
    assert "not tuned" in str(grid)


# --- text ---


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(rows) + "\n")
    return path


def test_one_package_of_each_source_is_taken_with_the_end_of_its_section():
    blocks = [f"Package: p{k}\nSection: contrib/games\nDescription: game {k}\n more" for k in range(60)]
    blocks += [
        "Package: p0-data\nSource: p0 (1.2)\nSection: games\nDescription: again",
        "Package: x\nSection: net",
    ]
    rows = text.debian("\n\n".join(blocks))
    assert sorted(rows.first) == sorted(f"game {k}" for k in range(60))
    assert set(rows.labels) == {"games"}


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


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return text.pretended(tmp_path_factory.mktemp("tiny"))


def test_frozen_layers_and_top_layer_together_are_the_whole_network(tiny, tmp_path):
    from transformers import BertConfig, BertModel  # noqa: PLC0415

    torch.manual_seed(0)
    # Larger weights than a fresh network's, with which a layer is hardly more than its residual.
    config = BertConfig.from_pretrained(tiny[0], initializer_range=0.5)
    whole = BertModel(config, add_pooling_layer=False).eval()
    whole.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((tiny[0] / "tokenizer.json").read_bytes())
    bert, rows = text.load(tmp_path), text.debian(tiny[1])
    data = text.corpus(text.Rows(rows.first[:8], rows.second[:8], rows.labels[:8]), bert, text.TOKENS)
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


# --- images ---


@pytest.fixture(scope="module")
def images():
    base = vit.digits(epochs=1, sizes=(96, 30))
    return vit.Mixed("small", base.draw, base.features, base.outputs, epochs=1, batch_size=32)


def test_models_that_train_at_once_do_not_touch_each_other(images):
    cells = [Cell(0.01, 0.05), Cell(0.02, 0.0)]
    together = vit.train(images, Arm("plain"), [0, 1], cells, ())
    alone = vit.train(images, Arm("plain"), [1], cells[1:], ())
    # Three steps of AdamW in float32, where a batched product may add in another order.
    eps = 1e4 * torch.finfo(torch.float32).eps
    assert together[1, cells[1]][0].test["mean_loss"] == pytest.approx(
        alone[1, cells[1]][0].test["mean_loss"], eps
    )
    assert together[0, cells[1]][0].test["mean_loss"] != together[1, cells[1]][0].test["mean_loss"]


def test_weights_see_the_mixed_losses(images):
    cell = Cell(0.01, 0.05)
    one, three = (
        vit.train(images, Arm("rgd", rgd.KL(tau)), [0], [cell], ())[0, cell][0] for tau in (1.0, 3.0)
    )
    # The first losses are near log 10 = 2.3: above tau = 1, whose weight is exp(1/2), and below tau = 3.
    assert one.mean_weight == pytest.approx(np.exp(0.5), rel=0.02)
    assert 1.5 < three.mean_weight < np.exp(0.75)


def test_patches_hold_the_pixels_of_a_square():
    network, seen = vit.ViT(), []
    network.embed.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    network(torch.arange(64.0).view(1, 64))
    assert seen[0][0, 0].tolist() == [0, 1, 8, 9]
    assert seen[0][0, 5].tolist() == [18, 19, 26, 27]
