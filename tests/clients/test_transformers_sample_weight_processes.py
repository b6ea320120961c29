"""A column `sample_weight` in a `Trainer` of two processes: the step is that of one process."""

import os
import pathlib
import subprocess
import sys

import pytest
import torch
from tiny_models import tiny
from weighted_rows import BY_TOKEN, P

pytest.importorskip("transformers.trainer")
pytest.importorskip("accelerate")

import transformers
from test_transformers_sample_weight import assert_stepped, objective_of
from torch import distributed as dist

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]

HERE = pathlib.Path(__file__).parent
PROGRAM = """
import sys
import torch, transformers
from rgd.integrations.transformers import rgd_loss_func, use_linear_rgd
from test_transformers_sample_weight import Rows, TAU, tiny, trained
from weighted_rows import BY_TOKEN, P

linear, by_token, folder = sys.argv[1] == "linear", sys.argv[2] == "tokens", sys.argv[3]
model = tiny(transformers, "Llama", dtype=torch.float64)
loss_func = None if linear else rgd_loss_func(tau=TAU)
if linear:
    use_linear_rgd(model, tau=TAU)
settings = {"gradient_accumulation_steps": 2, "ddp_backend": "gloo"}
trainer = trained(model, Rows(BY_TOKEN if by_token else P), folder, "padded", loss_func, **settings)
assert trainer.accelerator.num_processes == 2 and trainer.state.global_step == 1
shifts = getattr(trainer, "_loss_shifts_labels", False)
parameters = [one.detach() for one in trainer.accelerator.unwrap_model(trainer.model).parameters()]
torch.save((parameters, shifts), f"{folder}/{trainer.accelerator.process_index}.pt")
"""


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
@pytest.mark.parametrize(("way", "rows"), [("logits", "rows"), ("linear", "tokens")])
def test_two_processes_make_the_step_of_one(tmp_path, way, rows):
    (tmp_path / "program.py").write_text(PROGRAM)
    paths = [str(HERE), str(HERE.parent / "support"), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         str(tmp_path / "program.py"), way, rows, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    before, weights = tiny(transformers, "Llama", dtype=torch.float64), BY_TOKEN if rows == "tokens" else P
    for rank in range(2):
        parameters, shifts = torch.load(tmp_path / f"{rank}.pt")
        after = tiny(transformers, "Llama", dtype=torch.float64)
        with torch.no_grad():
            for one, value in zip(after.parameters(), parameters, strict=True):
                one.copy_(value)
        trainer = type("Trained", (), {"_loss_shifts_labels": shifts})
        assert_stepped(after, before, objective_of(before, trainer, weights, "element", "padded"))
