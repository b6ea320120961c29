"""The JAX examples run, warnings being errors, and print what they promise."""

import importlib
from pathlib import Path

import pytest

pytest.importorskip("jax")

import jax.numpy as jnp
import rgd
import rgd.jax
from programs import run_script

pytestmark = pytest.mark.usefixtures("compiled_in_a_hurry")
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(
    ("script", "needs", "printed"),
    [
        ("jax_flax", "flax", "worst class"),
        ("jax_equinox", "equinox", "rare part"),
        ("jax_maml", "optax", "worst tenth"),
    ],
)
def test_example_runs_and_prints_its_table(script, needs, printed):
    pytest.importorskip(needs)
    # Two seeds are the fewest that have a standard error.
    output = run_script(EXAMPLES / f"{script}.py", 2, 20)
    assert printed in output
    assert "nan" not in output


def test_a_schedule_of_the_flax_example_traces_its_step_once(monkeypatch):
    nnx, optax = pytest.importorskip("flax.nnx"), pytest.importorskip("optax")
    monkeypatch.syspath_prepend(EXAMPLES)
    example = importlib.import_module("jax_flax")
    traced, cross_entropy = [], rgd.jax.cross_entropy

    def counted(*args, weighting):
        traced.append(weighting)
        return cross_entropy(*args, weighting=weighting)

    monkeypatch.setattr(rgd.jax, "cross_entropy", counted)
    model = example.Classifier(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.0), wrt=nnx.Param)
    labels = jnp.arange(8) % example.CLASSES
    inputs = example.sample(1, labels)
    for tau in (1.0, 2.0, 3.0):
        weighting = rgd.KL(tau=tau)
        loss = example.train_step(model, optimizer, inputs, labels, weighting)
        expected = cross_entropy(model(inputs), labels, weighting=weighting)
        assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert len(traced) == 1


def test_notebook_runs_and_keeps_its_outputs(monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(EXAMPLES / "quickstart_jax.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    outputs = [output for cell in code for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data"}
    assert any("image/png" in output.get("data", {}) for output in outputs)
    training = next(cell for cell in code if "EPOCHS, SEEDS = 30, range(5)" in cell.source)
    training.source = training.source.replace("30, range(5)", "2, range(2)")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "steps; traced 2 times, for ERM, KL" in printed


def test_benchmark_prints_its_table():
    benchmark = EXAMPLES.parent / "benches" / "jax_cross_entropy.py"
    assert "(8, 10)" in run_script(benchmark, "--sizes", "8x10", "--seconds", 0)
