"""A loss that is built on the meta device, or moved there: its numbers and its state are never garbage."""

import copy
import warnings

import pytest
import rgd
import torch
from rgd.torch import RGD, LinearRGDLoss, RGDLoss, sample_weights
from rgd.torch._head import Chunking, LinearHead
from rgd.torch._operators import flattened
from rgd.torch._problem import Options, Problem
from torch import nn

STATEFUL = {
    "shares": rgd.GroupDRO(2, 0.1),
    "mean": rgd.MovingAverage(rgd.KL(tau=1.0), decay=0.9),
    "trimmed": rgd.Trimmed(rgd.GroupDRO(2, 0.1), 0.1),
}
MEMBERS = {
    "kl": rgd.KL(),
    "negative": rgd.KL(scale=-0.7),
    "cvar": rgd.CVaR(0.3),
    "focal": rgd.Focal(2.0),
    "ball": rgd.KLBall(0.1),
    **STATEFUL,
}


def built_on_meta(weighting, **settings):
    with torch.device("meta"):
        return RGDLoss(weighting=weighting, **settings)


def batch(n=8, classes=3):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(n, classes, generator=generator, requires_grad=True)
    return logits, torch.arange(n) % classes, torch.arange(n) % 2


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_loss_built_on_the_meta_device_computes_as_one_built_on_the_cpu(name, compiled):
    found = []
    for criterion in (RGDLoss(weighting=MEMBERS[name]), built_on_meta(MEMBERS[name])):
        call = torch.compile(criterion, backend="aot_eager") if compiled else criterion
        for _ in range(2):
            logits, target, groups = batch()
            loss = call(logits, target, groups=groups if "shares" in str(criterion.state_dict()) else None)
            loss.backward()
        found.append((loss.detach(), logits.grad, criterion.state_dict()))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_a_default_device_changes_nothing():
    torch.set_default_device("meta")
    try:
        criterion = RGDLoss(weighting=rgd.GroupDRO(2, 0.1))
        optimizer = RGD(torch.optim.SGD([torch.zeros(1, device="cpu")], lr=0.1), rgd.GroupDRO(2, 0.1))
        weights = sample_weights(torch.tensor([0.0, 2.0], device="cpu"), rgd.CVaR(0.5))
    finally:
        torch.set_default_device("cpu")
    assert criterion.state_dict()["weighting_state.shares"].tolist() == [0.5, 0.5]
    assert optimizer.weighting_state.state_dict()["shares"].tolist() == [0.5, 0.5]
    assert weights.tolist() == [0.0, 2.0]


@pytest.mark.parametrize("name", STATEFUL)
def test_to_empty_keeps_the_state_also_a_trained_one(name):
    criterion = RGDLoss(weighting=STATEFUL[name])
    logits, target, groups = batch()
    criterion(logits, target, groups=groups)
    before = copy.deepcopy(criterion.state_dict())
    criterion.to_empty(device="cpu")
    torch.testing.assert_close(criterion.state_dict(), before, rtol=0, atol=0)
    fresh = built_on_meta(STATEFUL[name]).to_empty(device="cpu")
    torch.testing.assert_close(
        fresh.state_dict(), RGDLoss(weighting=STATEFUL[name]).state_dict(), rtol=0, atol=0
    )


def test_a_linear_head_built_on_the_meta_device_trains_after_to_empty():
    with torch.device("meta"):
        criterion = LinearRGDLoss(4, 3, weighting=rgd.GroupDRO(2, 0.5))
    criterion.to_empty(device="cpu")
    nn.init.zeros_(criterion.linear.weight)
    criterion(
        torch.ones(2, 4, requires_grad=True), torch.tensor([0, 1]), groups=torch.tensor([0, 1])
    ).backward()
    assert criterion.state_dict()["weighting_state.shares"].tolist() == [0.5, 0.5]


def test_a_state_moved_to_the_meta_device_is_refused_and_begins_anew_on_a_real_one():
    criterion = RGDLoss(weighting=rgd.GroupDRO(2, 0.5)).to("meta")
    logits, target, groups = batch()
    with pytest.raises(RuntimeError, match=r"moved to the meta device.*reset_parameters"):
        criterion(logits, target, groups=groups)
    criterion.to_empty(device="cpu")
    with pytest.warns(UserWarning, match="begins anew"):
        assert criterion.state_dict()["weighting_state.shares"].tolist() == [0.5, 0.5]
    again = RGDLoss(weighting=rgd.GroupDRO(2, 0.5)).to("meta").to_empty(device="cpu")
    again.reset_parameters()
    assert again.state_dict()["weighting_state.shares"].tolist() == [0.5, 0.5]


def test_reset_parameters_lets_the_weighting_begin_anew():
    criterion = RGDLoss(weighting=rgd.MovingAverage(rgd.KL(), decay=0.5))
    before = copy.deepcopy(criterion.state_dict())
    logits, target, _ = batch()
    criterion(logits, target)
    assert criterion.state_dict()["weighting_state.updates"] == 1
    criterion.reset_parameters()
    torch.testing.assert_close(criterion.state_dict(), before, rtol=0, atol=0)
    RGDLoss().reset_parameters()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_memory_that_a_loader_put_in_place_of_the_state_is_not_read(compiled):
    criterion = built_on_meta(rgd.GroupDRO(2, 0.5))
    state = criterion.weighting_state
    state._buffers["shares"] = torch.full_like(state.shares, 6.9e-310)
    logits, target, groups = batch()
    call = torch.compile(criterion, backend="aot_eager") if compiled else criterion
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss = call(logits, target, groups=groups)
    assert any("begins anew" in str(one.message) for one in caught)
    torch.testing.assert_close(loss, RGDLoss(weighting=rgd.GroupDRO(2, 0.5))(logits, target, groups=groups))


def test_a_copy_that_a_dispatcher_put_in_place_of_the_state_is_read():
    criterion = RGDLoss(weighting=rgd.GroupDRO(2, 0.5))
    logits, target, groups = batch()
    criterion(logits, target, groups=groups)
    state = criterion.weighting_state
    expected = state.shares.tolist()
    state._buffers["shares"] = state.shares.clone()
    assert criterion.state_dict()["weighting_state.shares"].tolist() == expected


def test_a_state_is_loaded_into_a_loss_built_on_the_meta_device():
    trained = RGDLoss(weighting=rgd.GroupDRO(2, 0.5))
    logits, target, groups = batch()
    trained(logits, target, groups=groups)
    saved = trained.state_dict()
    for criterion in (
        built_on_meta(rgd.GroupDRO(2, 0.5)),
        RGDLoss(weighting=rgd.GroupDRO(2, 0.5)).to("meta"),
    ):
        for assign in (False, True):
            criterion.load_state_dict(saved, assign=assign)
            torch.testing.assert_close(criterion.state_dict(), saved, rtol=0, atol=0)


def test_a_model_of_transformers_without_a_state_in_its_checkpoint_begins_with_the_first_one(tmp_path):
    transformers = pytest.importorskip("transformers")

    class WithLoss(transformers.PreTrainedModel):
        config_class = transformers.PretrainedConfig

        def __init__(self, config):
            super().__init__(config)
            self.linear = nn.Linear(2, 3)
            if getattr(config, "remembers", True):
                self.criterion = RGDLoss(weighting=rgd.GroupDRO(2, 0.5))
            self.post_init()

    config = transformers.PretrainedConfig()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.utils.logging.set_verbosity_error()
        config.remembers = False
        WithLoss(config).save_pretrained(tmp_path / "without")
        config.remembers = True
        model = WithLoss.from_pretrained(tmp_path / "without", config=config)
        assert model.criterion.state_dict()["weighting_state.shares"].tolist() == [0.5, 0.5]
        model.train()
        logits, target, groups = batch()
        model.criterion(logits, target, groups=groups)
        expected = model.criterion.state_dict()["weighting_state.shares"].tolist()
        assert expected != [0.5, 0.5]
        model.save_pretrained(tmp_path / "with")
        loaded = WithLoss.from_pretrained(tmp_path / "with").train()
    assert loaded.criterion.state_dict()["weighting_state.shares"].tolist() == expected
    logits, target, groups = batch()
    torch.testing.assert_close(
        loaded.criterion(logits, target, groups=groups), model.criterion(logits, target, groups=groups)
    )


@pytest.mark.parametrize("wrong", ["logits", "target", "class_weight", "measure", "numbers", "adjustment"])
def test_an_operator_refuses_a_tensor_without_memory(wrong):
    given = {
        "logits": torch.zeros(3, 2),
        "target": torch.zeros(3, dtype=torch.long),
        "class_weight": torch.ones(2),
        "measure": torch.ones(3),
        "numbers": torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64),
        "adjustment": torch.zeros(2),
    }
    given[wrong] = given[wrong].to("meta")
    numbers, losses = given.pop("numbers"), torch.ones(3)
    plain, operators = flattened(Problem(options=Options(), **given)), torch.ops.rgd
    with pytest.raises(RuntimeError, match="meta device"):
        operators.cross_entropy(*plain, True, "kl", numbers)
    if wrong == "numbers":
        return
    with pytest.raises(RuntimeError, match="meta device"):
        operators.cross_entropy_gradient(*plain, True, losses, losses, None)
    with pytest.raises(RuntimeError, match="meta device"):
        operators.cross_entropy_losses(*plain)
    head = LinearHead(torch.ones(2, 2), None, Chunking())
    with pytest.raises(RuntimeError, match="meta device"):
        operators.linear_losses(*flattened(Problem(options=Options(), head=head, **given)))


def test_weights_of_numbers_without_memory_are_refused():
    with pytest.raises(RuntimeError, match="meta device"):
        torch.ops.rgd.sample_weights(torch.rand(3), "kl", torch.zeros(3, dtype=torch.float64, device="meta"))


def test_numbers_on_a_prepared_device_follow_the_weighting():
    from rgd.torch._plan import Plan  # noqa: PLC0415

    plan = Plan(rgd.KL(tau=1.0)).prepare()
    plan._live_on["somewhere"] = plan.live
    later = plan.replaced(rgd.KL(tau=2.0))
    assert later._live_on["somewhere"].tau == 2.0
    assert later.numbers is plan.numbers
