"""Install a built wheel into a throw-away environment with no Rust on its PATH, and try it there.

    python tests/package/smoke_wheel.py dist/rgd-*.whl

Not a test module of pytest: `make wheel` runs it. Only the wheel's dependencies, NumPy and array-api-compat,
are installed beside it; where the interpreter that runs this has torch, `rgd.torch` is tried with that copy.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv

NUMPY_PART = """
import math, pathlib, sys
import numpy as np
import rgd

assert pathlib.Path(rgd.__file__).is_relative_to(sys.prefix), rgd.__file__
losses = np.array([0.0, 0.5, 3.0])
weights = rgd.sample_weights(losses, tau=1.0)
np.testing.assert_allclose(weights, [1.0, math.exp(0.25), math.exp(0.5)], rtol=1e-14)
np.testing.assert_allclose(rgd.reweighted_mean(losses, tau=1.0), (weights * losses).mean(), rtol=1e-14)
np.testing.assert_allclose(rgd.sample_weights(losses, rgd.KLBall(radius=10.0)), [0.0, 0.0, 3.0])
np.testing.assert_allclose(rgd.sample_weights(losses, rgd.CVaR(1 / 3)), [0.0, 0.0, 3.0])
assert rgd.sample_weights(losses.astype(np.float32)).dtype == np.float32
assert "torch" not in sys.modules
print(f"rgd {rgd.__version__} with NumPy {np.__version__}: the weights are right")
"""

TORCH_PART = """
import torch
import torch.nn.functional as F
from rgd.torch import RGDLoss

logits = torch.tensor([[0.0, 0.0], [5.0, -1.0], [1.0, 2.0]], requires_grad=True)
target = torch.tensor([0, 1, 1])
RGDLoss(tau=1.0)(logits, target).backward()
losses = F.cross_entropy(logits.detach(), target, reduction="none")
weights = torch.exp(losses.clamp(max=1.0) / 2.0)
expected = (torch.softmax(logits.detach(), 1) - F.one_hot(target, 2)) * weights[:, None] / 3
torch.testing.assert_close(logits.grad, expected)
print(f"rgd.torch with torch {torch.__version__}: the gradient is right")
"""


def main(wheel: pathlib.Path) -> None:
    with tempfile.TemporaryDirectory(prefix="rgd-wheel-") as folder:
        venv.create(folder, with_pip=True, symlinks=os.name != "nt")
        python = pathlib.Path(folder, "Scripts" if os.name == "nt" else "bin", "python")
        environment = without_rust(os.environ.copy(), python.parent)
        run = [str(python), "-c"]
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        # Wheels only: nothing is compiled on this machine.
        subprocess.run([*pip, "--only-binary=:all:", str(wheel)], check=True, env=environment, cwd=folder)
        subprocess.run([*run, NUMPY_PART], check=True, env=environment, cwd=folder)
        subprocess.run([str(python), "-m", "rgd"], check=True, env=environment, cwd=folder)
        site_packages = sysconfig.get_path("purelib")
        if not pathlib.Path(site_packages, "torch").is_dir():
            print("torch is not installed here: rgd.torch was not tried")
            return
        # A folder on PYTHONPATH has no .pth files read, so an editable rgd in it stays out of the way.
        environment["PYTHONPATH"] = site_packages
        check = f"import rgd, sys; assert rgd.__file__.startswith(sys.prefix), rgd.__file__\n{TORCH_PART}"
        subprocess.run([*run, check], check=True, env=environment, cwd=folder)


def without_rust(environment: dict[str, str], first: pathlib.Path) -> dict[str, str]:
    """The environment with `first` leading PATH, and no folder on it that has a cargo or a rustc."""
    folders = environment.get("PATH", os.defpath).split(os.pathsep)
    folders = [f for f in folders if not any(shutil.which(tool, path=f) for tool in ("cargo", "rustc"))]
    dropped = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "CARGO_HOME", "RUSTUP_HOME")
    return {
        **{name: value for name, value in environment.items() if name not in dropped},
        "PATH": os.pathsep.join([str(first), *folders]),
    }


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/package/smoke_wheel.py WHEEL (one)")
    main(pathlib.Path(sys.argv[1]).resolve())
