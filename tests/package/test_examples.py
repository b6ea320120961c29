"""The examples and the notebook run, and what they report follows from what they trained."""

import importlib.util
import pathlib
import re
import subprocess
import sys

import nbclient
import nbformat
import numpy as np
import pytest
import torch
from programs import run_script

pytestmark = pytest.mark.usefixtures("one_thread")
EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def longtail():
    """`examples/longtail_digits.py` as a module."""
    spec = importlib.util.spec_from_file_location("longtail_digits", EXAMPLES / "longtail_digits.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    threads = torch.get_num_threads()
    spec.loader.exec_module(module)
    yield module
    torch.set_num_threads(threads)
    del sys.modules[spec.name]


def test_the_demo_prints_its_table_and_draws_its_picture_with_any_number_of_processes(
    longtail, tmp_path, capsys
):
    path = tmp_path / "folder" / "picture.png"
    arguments = ["--quick", "--output", str(path)]
    longtail.main([*arguments, "--jobs", "1"])
    printed = capsys.readouterr().out
    for line in ("long-tailed, factor 100, weight decay 0.02", "balanced, weight decay 0"):
        assert line in printed.splitlines()
    assert sum(line.startswith("RGDLoss ") for line in printed.splitlines()) == 5
    assert path.read_bytes().startswith(b"\x89PNG")
    command = [sys.executable, EXAMPLES / "longtail_digits.py", *arguments, "--jobs", "2"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == printed


def test_the_pictures_of_the_weights_are_drawn(tmp_path):
    run_script(EXAMPLES / "weight_pictures.py", "--epochs", 2, "--output", tmp_path / "new")
    names = {"weight_curve.png", "weight_history.png", "heaviest_samples.png"}
    assert {path.name for path in (tmp_path / "new").iterdir()} == names
    docs = EXAMPLES.parent / "docs"
    assert all((docs / name).read_bytes().startswith(b"\x89PNG") for name in names)


def test_the_picture_of_every_weighting_is_drawn(tmp_path):
    run_script(EXAMPLES / "weight_curves.py", "--output", tmp_path)
    drawn = (tmp_path / "mathematics.png").read_bytes()
    assert drawn.startswith(b"\x89PNG")
    assert len(drawn) > 30_000


def test_the_long_tail_falls_from_100_images_to_1(longtail):
    assert longtail.class_sizes(100) == [100, 60, 36, 22, 13, 8, 5, 3, 2, 1]
    assert longtail.class_sizes(1) == [100] * 10


@pytest.mark.parametrize("imbalance", [1, 100])
def test_splits_share_no_image_and_the_test_images_are_those_of_every_seed(longtail, imbalance):
    def rows(part):
        return {image.numpy().tobytes() for image in part[0]}

    first, second = longtail.split(imbalance, 0), longtail.split(imbalance, 1)
    for split in (first, second):
        train, validation, test = split
        assert torch.bincount(train[1]).tolist() == longtail.class_sizes(imbalance)
        assert torch.bincount(validation[1]).tolist() == [24] * 10
        assert torch.bincount(test[1]).tolist() == [50] * 10
        assert not rows(train) & rows(validation)
        assert not rows(test) & (rows(train) | rows(validation))
    assert torch.equal(first[2][0], second[2][0])
    assert rows(first[0]) != rows(second[0])


def test_the_interval_is_student_t_s(longtail):
    # t of 9 degrees of freedom at 97.5%, from the tables: 2.262.
    mean, half = longtail.interval(np.arange(10.0))
    assert mean == 4.5
    assert half == pytest.approx(2.262 * np.arange(10.0).std(ddof=1) / np.sqrt(10), rel=1e-3)


def test_the_learning_rate_is_chosen_on_validation_whatever_the_test_says(longtail):
    setting = longtail.Setting(100.0, 0.0)
    accuracies = {}
    for rate, validation, test in [(0.1, 0.2, 0.9), (0.2, 0.7, 0.1)]:
        for seed in range(2):
            run = longtail.Run(setting, "RGDLoss", rate, seed, 1.0, 1)
            accuracies[run] = longtail.Accuracy(np.full(10, validation), np.full(10, test))
    arm = longtail.best_learning_rate(setting, "RGDLoss", accuracies, (0.1, 0.2))
    assert arm.learning_rate == 0.2
    assert arm.accuracy.test.shape == (2, 10)


def test_the_notebook_runs():
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    training = next(cell for cell in notebook.cells if "EPOCHS, SEEDS = 30, range(5)" in cell.source)
    training.source = training.source.replace("30, range(5)", "2, range(2)")
    resources = {"metadata": {"path": str(EXAMPLES)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()


def test_the_notebook_is_kept_with_its_outputs():
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data"}
    assert any("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.parametrize("name", ["quickstart", "quickstart_jax"])
def test_a_notebook_is_short_and_tells_before_each_cell_what_it_does(name):
    notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    assert [cell.cell_type for cell in notebook.cells] == ["markdown", "code"] * 5


@pytest.mark.parametrize("name", ["quickstart", "quickstart_jax"])
def test_the_titles_of_a_notebook_say_what_its_outputs_show(name):
    notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    comparisons = [cell for cell in notebook.cells if re.search(r"^compare\(", cell.source, re.MULTILINE)]
    with_wrong, with_right = [
        [float(number) for number in re.findall(r" ([\d.]+)%", cell.outputs[0].text)] for cell in comparisons
    ]
    assert "both negative scales gain, the ramp most" in comparisons[0].source
    assert with_wrong == sorted(set(with_wrong))
    assert "both lose a little to plain training" in comparisons[1].source
    assert max(with_right[1:]) < with_right[0] < min(with_right[1:]) + 2
    assert len(with_wrong) == len(with_right) == 3
