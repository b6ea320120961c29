"""What a user's editor lists: public names alone."""

import importlib
import subprocess
import sys

import pytest

FRONTS = ["rgd", "rgd.torch", "rgd.jax", "rgd.optax"]


@pytest.mark.parametrize("front", FRONTS)
def test_a_front_lists_its_public_names_alone(front):
    module = importlib.import_module(front)
    listed = {name for name in dir(module) if not name.startswith("_")}
    modules = {name for name in listed if f"rgd.{name}" in sys.modules} if front == "rgd" else set()
    assert listed == set(module.__all__) | modules
    assert all(hasattr(module, name) for name in dir(module))
    assert not any(name.startswith("_") and name != "__version__" for name in dir(module))


def test_rgd_lists_a_public_module_once_it_is_imported():
    code = (
        "import rgd; before = set(dir(rgd)); import rgd.reference\n"
        "assert set(dir(rgd)) - before == {'reference'}, set(dir(rgd)) - before\n"
        "assert before - set(rgd.__all__) == {'__version__', 'class_counts', 'stats', 'weightings'}, before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
