"""What an editor, `help` and a first mistake tell a new user."""

import copy
import inspect
import pickle
import pydoc
import subprocess
import sys

import pytest
import rgd
import torch
from rgd.torch import RGD, LinearRGDLoss, RGDLoss
from torch import nn

WITHOUT_TAU = [rgd.ERM(), rgd.CVaR(0.1), rgd.GroupDRO(2, 0.1), rgd.KLBall(0.1)]


def sgd(weighting):
    return RGD(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1), weighting)


@pytest.mark.parametrize("weighting", WITHOUT_TAU, ids=str)
@pytest.mark.parametrize("make", [lambda w: RGDLoss(weighting=w), sgd], ids=["loss", "optimizer"])
def test_a_weighting_without_tau_is_looked_through_without_an_error(make, weighting):
    owner = make(weighting)
    assert not hasattr(owner, "tau")
    assert getattr(owner, "tau", None) is None
    assert "tau" not in dict(inspect.getmembers(owner))
    with pytest.raises(AttributeError, match=r"has no tau: set weighting=.*rgd\.KL\(tau=1\.0\)"):
        owner.tau  # noqa: B018
    with pytest.raises(TypeError, match="has no tau"):
        owner.tau = 2.0
    with pytest.raises(AttributeError, match="nonsense"):
        owner.nonsense  # noqa: B018
    assert make(rgd.KL(2.0)).tau == 2.0


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_torch_jit_trace_takes_a_model_that_holds_any_loss():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.criterion = RGDLoss(weighting=rgd.CVaR(0.1))

        def forward(self, x):
            return 2 * x

    traced = torch.jit.trace(Model(), torch.ones(2))
    assert traced(torch.ones(2)).tolist() == [2.0, 2.0]


def test_signatures_name_the_settings():
    names = list(inspect.signature(RGDLoss).parameters)
    assert names[:4] == ["weight", "ignore_index", "reduction", "label_smoothing"]
    assert names == [name for name in inspect.signature(RGDLoss.__init__).parameters if name != "self"]
    assert list(inspect.signature(LinearRGDLoss).parameters)[:2] == ["in_features", "num_classes"]

    class Mine(RGDLoss):
        def __init__(self, mine):
            super().__init__()

    assert list(inspect.signature(Mine).parameters) == ["mine"]


def test_a_loss_goes_by_one_name_with_and_without_a_base():
    plain, based = RGDLoss(), RGDLoss(base=nn.MSELoss(reduction="none"))
    for loss in (plain, based):
        assert type(loss).__name__ == type(loss).__qualname__ == "RGDLoss"
        assert repr(loss).startswith("RGDLoss(")
        for twin in (copy.copy(loss), copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
            assert type(twin) is type(loss)
            assert repr(twin) == repr(loss)
    with pytest.raises(TypeError, match=r"RGDLoss\.__init__\(\) got an unexpected keyword argument 'gamma'"):
        RGDLoss(gamma=2.0)


def test_help_tells_of_the_dial_and_names_every_weighting_before_the_first_class():
    of_loss = pydoc.render_doc(RGDLoss, renderer=pydoc.plaintext)
    assert "dial" in of_loss
    assert "scale=-0.7" in of_loss
    of_package = pydoc.render_doc(rgd, renderer=pydoc.plaintext)
    first = of_package[: of_package.index("CLASSES")]
    members = {name for name in rgd.__all__ if isinstance(getattr(rgd, name), type)}
    assert not [
        name for name in members - {"Batch", "GroupStats", "Suspects", "WeightStats"} if name not in first
    ]


def test_a_front_is_imported_when_it_is_first_used():
    code = (
        "import sys, rgd\n"
        "assert 'torch' not in sys.modules and 'jax' not in sys.modules\n"
        "assert rgd.torch.RGDLoss\n"
        "assert 'torch._dynamo' not in sys.modules, 'it takes seconds to import'\n"
        "assert rgd.jax.sample_weights and rgd.plot and rgd.boosting\n"
        "try:\n    rgd.tensorflow\nexcept AttributeError as error:\n    assert 'tensorflow' in str(error)"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_a_front_whose_library_is_missing_says_what_to_install():
    code = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "import rgd\n"
        "assert not hasattr(rgd, 'torch')\n"
        "try:\n    rgd.torch\nexcept AttributeError as error:\n"
        "    assert 'rgd.torch needs torch' in str(error) and 'pip install torch' in str(error), error"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
