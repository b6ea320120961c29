"""A call like the last one goes a short way, to the same numbers; any other goes the whole way."""

import copy
import pickle
import threading

import pytest
import rgd
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from rgd.torch import RGD, RGDLoss, backend, cross_entropy, functional, reweighted_mean
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

LOGITS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
TARGET = torch.tensor([0, 3, 1, 1, 2, 0])


@pytest.fixture
def ways(monkeypatch):
    """For each call that looked for the short way, whether it was taken."""
    return watched(monkeypatch, RGDLoss, "_again")


@pytest.fixture
def function_ways(monkeypatch):
    """The same for the calls of `cross_entropy` in this thread, of which the last ones are forgotten."""
    monkeypatch.setattr(functional._last, "plan", None)
    monkeypatch.setattr(functional._last, "accepted", None)
    return watched(monkeypatch, functional, "again")


@pytest.fixture
def ways_of_losses(monkeypatch):
    """The same for losses of any kind."""
    return watched(monkeypatch, functional, "plain_objective")


def watched(monkeypatch, owner, name):
    found, way = [], getattr(owner, name)

    def watch(*args, **kwargs):
        objective = way(*args, **kwargs)
        found.append(objective is not None)
        return objective

    monkeypatch.setattr(owner, name, watch)
    return found


def leaf(logits=LOGITS):
    return logits.detach().clone().requires_grad_()


def result(criterion, logits=LOGITS, target=TARGET):
    """Objective, gradient and record of a call."""
    logits = leaf(logits)
    objective = criterion(logits, target)
    (gradient,) = torch.autograd.grad(objective, logits, torch.full_like(objective, 3.0))
    stats = criterion.stats()
    return objective, gradient, criterion.last_weights, (stats.mean_loss, stats.count, stats.max_weight)


def equal(one, other):
    for a, b in zip(one[:3], other[:3], strict=True):
        assert a.dtype is b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert one[3] == other[3]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "sum", "ignore_index": 1},
        {"weight": torch.tensor([1.0, 2.0, 0.5, 3.0]), "label_smoothing": 0.1},
        {"logit_adjustment": torch.tensor([0.0, 1.0, -1.0, 0.5]), "z_loss": 0.1},
        {"weighting": rgd.Focal(2.0)},
        {"weighting": rgd.KLBall(0.1)},
        {"weighting": rgd.CVaR(0.5), "sync": False},
        {"reduction": "none", "weighting": rgd.CVaR(0.5), "ignore_index": 1},
        {"reduction": "none", "z_loss": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_short_way_leads_to_the_same_numbers(ways, options, dtype):
    if dtype is torch.float64:
        options = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    criterion = RGDLoss(**options)
    criterion(leaf(LOGITS.to(dtype)).flip(0), TARGET)
    short = result(criterion, LOGITS.to(dtype))
    assert ways == [True] * (criterion._plan.kernel is not None)
    equal(short, result(RGDLoss(**options), LOGITS.to(dtype)))


@pytest.mark.parametrize("per", ["element", "sample"])
@pytest.mark.parametrize("target", [TARGET, TARGET.int()], ids=str)
def test_images_and_narrow_targets(ways, per, target):
    logits, target = LOGITS.view(3, 2, 4).transpose(1, 2).contiguous(), target.view(3, 2)
    criterion = RGDLoss(per=per)
    criterion(leaf(logits), target)
    short = result(criterion, logits, target)
    assert ways == [True]
    equal(short, result(RGDLoss(per=per), logits, target))


@pytest.mark.parametrize("strided", ["logits", "target"])
def test_tensors_that_are_not_contiguous_go_the_whole_way(ways, strided):
    criterion = RGDLoss()
    criterion(leaf(), TARGET)
    logits = LOGITS.T.contiguous().T if strided == "logits" else LOGITS
    target = torch.stack([TARGET, TARGET], 1)[:, 0] if strided == "target" else TARGET
    objective = criterion(logits.detach().requires_grad_(), target)
    assert objective.item() == RGDLoss()(LOGITS, TARGET).item()
    assert ways == [False]


MASK = torch.tensor([True, True, False, True, True, True])
SHARES = torch.tensor([0.5, 3.0, 0.0, 1.0, 2.5, 1.0])
GROUPS = torch.tensor([0, 1, 1, 0, 2, 1])


def told(criterion, entries, logits=LOGITS, target=TARGET):
    """What a call with entries of its units computes, keeps and tells."""
    logits = leaf(logits)
    objective = criterion(logits, target, **entries)
    (gradient,) = torch.autograd.grad(objective, logits, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), logits)
    record = criterion._record
    kept = (record.losses, record.weights, record.measure, record.groups, torch.as_tensor(record.divisor))
    return [one for one in (objective, gradient, second, *kept) if one is not None], criterion.stats()


@pytest.mark.parametrize("entries", ["where", "sample_weight", "groups", "sample_weight and groups"])
@pytest.mark.parametrize(
    "options",
    [{}, {"reduction": "sum"}, {"ignore_index": 1}, {"weight": torch.tensor([0.5, 1.0, 2.0, 0.25])}],
    ids=str,
)
@pytest.mark.parametrize(
    "weighting", [rgd.KL(scale=-0.7), rgd.CVaR(0.5), rgd.GroupDRO(3, step_size=0.5)], ids=str
)
@pytest.mark.parametrize("per", ["element", "sample"])
def test_masks_sample_weights_and_groups_take_the_short_way_to_the_same_numbers(
    ways, entries, options, weighting, per
):
    logits, target = LOGITS, TARGET
    if per == "sample":
        logits, target = torch.stack([LOGITS, LOGITS.flip(0)], 2), torch.stack([TARGET, TARGET.roll(1)], 1)
    given = {"where": MASK, "sample_weight": SHARES, "groups": GROUPS}
    given = {name: one for name, one in given.items() if name in entries}
    if isinstance(weighting, rgd.GroupDRO):
        given["groups"] = GROUPS
    options = {**options, "weighting": weighting, "per": per}
    if per == "element" and logits is not LOGITS:
        given = {name: one[:, None].expand(target.shape) for name, one in given.items()}
    known, fresh = RGDLoss(**options), RGDLoss(**options)
    known(leaf(logits), target, **given)
    if known.weighting_state is not None:
        fresh.weighting_state.load_state_dict(known.weighting_state.state_dict())
    (found, stats), (expected, of_fresh) = (told(one, given, logits, target) for one in (known, fresh))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert stats == of_fresh
    assert ways == [True]


def test_a_state_moves_along_the_short_way_and_stays_in_evaluation(ways):
    weighting = rgd.MovingAverage(rgd.KL(tau=1.0), 0.9)
    criterion, slow = RGDLoss(weighting=weighting), RGDLoss(weighting=weighting)
    for seed in range(4):
        logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))
        slow._accepted = None
        equal(result(criterion, logits), result(slow, logits))
    assert ways == [True] * 3
    states = [one.weighting_state.state_dict() for one in (criterion, slow)]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    before = {name: leaf.clone() for name, leaf in criterion.weighting_state.state_dict().items()}
    criterion.eval()(leaf(), TARGET)
    assert ways == [True] * 3 + [False]
    torch.testing.assert_close(criterion.weighting_state.state_dict(), before, rtol=0, atol=0)


def test_a_state_that_was_loaded_or_replaced_is_the_one_that_moves(ways):
    weighting = rgd.MovingAverage(rgd.KL(tau=1.0), 0.9)
    criterion = RGDLoss(weighting=weighting)
    for _ in range(3):
        criterion(leaf(), TARGET)
    saved = {name: one.clone() for name, one in criterion.state_dict().items()}
    expected = criterion(leaf(LOGITS.flip(0)), TARGET).item()
    criterion.load_state_dict(saved)
    assert criterion(leaf(LOGITS.flip(0)), TARGET).item() == expected
    assert all(ways)


NO_SHORT_WAY = {
    "a strided mask": {"where": torch.stack([MASK, MASK], 1)[:, 0]},
    "mask and weights": {"where": MASK, "sample_weight": SHARES},
    "wide weights": {"sample_weight": SHARES.double()},
    "integer weights": {"sample_weight": torch.tensor([1, 2, 0, 1, 3, 1])},
    "tiny weights": {"sample_weight": SHARES * 1e-30},
    "huge weights": {"sample_weight": SHARES * 1e30},
    "narrow groups": {"groups": GROUPS.int()},
}


@pytest.mark.parametrize("case", list(NO_SHORT_WAY))
def test_other_entries_go_the_whole_way(ways, case):
    criterion, entries = RGDLoss(), NO_SHORT_WAY[case]
    criterion(leaf(), TARGET)
    (found, stats), (expected, of_fresh) = told(criterion, entries), told(RGDLoss(), entries)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert stats == of_fresh
    assert ways == [False]


WRONG_ENTRIES = {
    "negative": ({"sample_weight": -SHARES}, ValueError, "finite numbers >= 0"),
    "nan": ({"sample_weight": SHARES * float("nan")}, ValueError, "finite numbers >= 0"),
    "infinite": ({"sample_weight": SHARES / 0}, ValueError, "finite numbers >= 0"),
    "no mask": ({"where": SHARES}, TypeError, "where must be"),
    "short": ({"sample_weight": SHARES[:3]}, ValueError, "must have the shape"),
    "no group": ({"groups": GROUPS + 1}, ValueError, r"groups must lie in 0\.\.2"),
}


@pytest.mark.parametrize("case", list(WRONG_ENTRIES))
def test_wrong_entries_are_refused_on_every_way_and_move_no_state(case):
    entries, error, message = WRONG_ENTRIES[case]
    criterion = RGDLoss(weighting=rgd.GroupDRO(3, step_size=0.5))
    criterion(leaf(), TARGET, groups=GROUPS)
    before = {name: one.clone() for name, one in criterion.state_dict().items()}
    with pytest.raises(error, match=message):
        criterion(leaf(), TARGET, **{"groups": GROUPS, **entries})
    torch.testing.assert_close(dict(criterion.state_dict()), before, rtol=0, atol=0)


def test_no_derivative_reads_a_target_that_takes_no_part(ways):
    criterion, target = RGDLoss(), TARGET.masked_fill(~MASK, -7)
    (whole, stats), (short, same_stats) = (told(criterion, {"where": MASK}, target=target) for _ in range(2))
    assert ways == [True]
    torch.testing.assert_close(short, whole, rtol=1e-6, atol=1e-7)
    assert same_stats == stats


def test_the_caller_may_change_its_entries_after_the_call():
    criterion, shares, groups = RGDLoss(), SHARES.clone(), GROUPS.clone()
    criterion(leaf(), TARGET, sample_weight=shares, groups=groups)
    before = criterion.stats()
    # What this call leaves behind is read after the change.
    objective = criterion(x := leaf(), TARGET, sample_weight=shares, groups=groups)
    shares.zero_()
    groups.zero_()
    assert criterion.stats() == before
    (first,) = torch.autograd.grad(objective, x, create_graph=True)
    assert first.requires_grad


def set_weight(criterion):
    criterion.weight = torch.tensor([1.0, 2.0, 3.0, 4.0])


def change_weight(criterion):
    with torch.no_grad():
        criterion.weight.mul_(2)


def make_a_parameter(criterion):
    weight = criterion.weight
    del criterion.weight
    criterion.weight = nn.Parameter(weight.clone())


CHANGES = {
    "reduction": lambda c: setattr(c, "reduction", "sum"),
    "ignore_index": lambda c: setattr(c, "ignore_index", 1),
    "label_smoothing": lambda c: setattr(c, "label_smoothing", 0.2),
    "z_loss": lambda c: setattr(c, "z_loss", 0.2),
    "tau": lambda c: setattr(c, "tau", 0.5),
    "scale": lambda c: setattr(c, "scale", -0.5),
    "weighting": lambda c: setattr(c, "weighting", rgd.CVaR(0.5)),
    "by another way": lambda c: vars(c).update(reduction="sum"),
    "weight": set_weight,
    "weight in place": change_weight,
    "weight, a parameter": make_a_parameter,
    "weight, in place with grad": lambda c: c.weight.requires_grad_(),
    "no weight": lambda c: setattr(c, "weight", None),
    "adjustment": lambda c: setattr(c, "logit_adjustment", torch.ones(4)),
    "totals": lambda c: c.reset_stats(),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_a_loss_that_was_changed_goes_the_whole_way(ways, change):
    criterion, fresh = (RGDLoss(weight=torch.tensor([1.0, 1.0, 2.0, 1.0])) for _ in range(2))
    criterion(leaf(), TARGET)
    for one in (criterion, fresh):
        CHANGES[change](one)
    equal(result(criterion), result(fresh))
    assert ways == [False]


TENSORS = {
    "dtype": lambda: (LOGITS.double(), TARGET),
    "dtype of the target": lambda: (LOGITS, TARGET.int()),
    "shape": lambda: (LOGITS[:4], TARGET[:4]),
    "probabilities": lambda: (LOGITS, torch.softmax(LOGITS.flip(0), 1)),
    "negated": lambda: (torch._neg_view(-LOGITS), TARGET),
}


@pytest.mark.parametrize("change", list(TENSORS))
def test_other_tensors_go_the_whole_way(ways, change):
    criterion = RGDLoss()
    criterion(leaf(), TARGET)
    logits, target = TENSORS[change]()
    # Negated again by the clone, were it a leaf.
    logits = logits.requires_grad_() if change == "negated" else leaf(logits)
    objective, expected = criterion(logits, target), RGDLoss()(logits.detach().clone(), target)
    assert objective.item() == expected.item()
    assert ways == [False]


class Tagged(torch.Tensor):
    pass


def test_a_tensor_with_a_behaviour_of_its_own_goes_the_whole_way(ways):
    criterion = RGDLoss()
    criterion(leaf(), TARGET)
    assert criterion(LOGITS.as_subclass(Tagged).requires_grad_(), TARGET).item() == RGDLoss()(LOGITS, TARGET)
    assert ways == [False]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
@pytest.mark.parametrize("layout", ["sparse", "nested", "meta"])
def test_other_layouts_and_devices_are_looked_at_anew(ways, layout):
    criterion = RGDLoss()
    criterion(leaf(), TARGET)
    if layout == "meta":
        with pytest.raises(ValueError, match="move both to one device"):
            criterion(leaf(LOGITS.to("meta")), TARGET)
    else:
        logits = LOGITS.to_sparse() if layout == "sparse" else torch.nested.nested_tensor([LOGITS[0]] * 6)
        with pytest.raises(TypeError, match=layout):
            criterion(logits.requires_grad_(), TARGET)
    assert ways == [False]


def trained_alike(call):
    """The same numbers from a loss that has accepted such a call, and from a fresh one."""
    known = RGDLoss()
    known(leaf(), TARGET)
    found, expected = call(known), call(RGDLoss())
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    return known


MODES = {
    "no_grad": lambda c: torch.no_grad()(c)(leaf(), TARGET),
    "inference": lambda c: torch.inference_mode()(c)(leaf(), TARGET),
    "without grad": lambda c: c(LOGITS, TARGET),
    "evaluation": lambda c: c.eval()(LOGITS, TARGET),
    "func.grad": lambda c: torch.func.grad(c)(leaf(), TARGET),
    "func.vmap": lambda c: torch.func.vmap(c, (0, None))(LOGITS.expand(2, 6, 4), TARGET),
    "checkpoint": lambda c: torch.autograd.grad(checkpoint(c, x := leaf(), TARGET, use_reentrant=False), x),
    "trace": lambda c: torch.jit.trace(c, (leaf(), TARGET))(LOGITS, TARGET),
}


@pytest.mark.filterwarnings("ignore")  # torch.jit.trace warns of itself and of every shape
@pytest.mark.parametrize("mode", list(MODES))
def test_a_call_in_a_mode_goes_the_whole_way(ways, mode):
    trained_alike(MODES[mode])
    assert ways
    assert not any(ways)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_forward_derivatives_go_the_whole_way(ways):
    def tangent(criterion):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(leaf(), torch.ones_like(LOGITS) * LOGITS)
            return forward_ad.unpack_dual(criterion(dual, TARGET)).tangent

    trained_alike(tangent)
    assert ways == [False]


def test_hooks_on_saved_tensors_get_the_gradient(ways):
    packed = []

    def call(criterion):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.shape) or t, lambda t: t):
            x = leaf()
            objective = criterion(x, TARGET)
        return torch.autograd.grad(objective, x)[0]

    trained_alike(call)
    assert ways == [False]
    assert len(packed) % 2 == 0
    assert packed[: len(packed) // 2] == packed[len(packed) // 2 :]


def test_autocast_keeps_the_objective_wide(ways):
    x = LOGITS.bfloat16()
    criterion = RGDLoss()
    assert criterion(leaf(x), TARGET).dtype is torch.bfloat16
    assert criterion(leaf(x), TARGET).dtype is torch.bfloat16
    with torch.autocast("cpu"):
        assert criterion(leaf(x), TARGET).dtype is RGDLoss()(leaf(x), TARGET).dtype
    assert ways == [True, False]


def test_a_backend_that_is_asked_for_runs_and_every_call_is_seen(ways):
    criterion = RGDLoss()
    criterion(leaf(), TARGET)
    with backend("composite") as ran:
        criterion(leaf(), TARGET)
    with backend() as seen:
        criterion(leaf(), TARGET)
    assert (ran, seen) == (["composite"], ["rust"])
    assert criterion(leaf(), TARGET).item() == RGDLoss()(LOGITS, TARGET).item()
    assert ways == [False, True]
    with backend():
        criterion(leaf(), TARGET)
    assert ways == [False, True, False]


def test_memory_that_was_given_back_is_refused():
    criterion, logits = RGDLoss(), leaf()
    criterion(logits, TARGET)
    logits.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="no data"):
        criterion(logits, TARGET)


def test_what_the_whole_way_refuses_is_refused(ways):
    criterion = RGDLoss()
    criterion(leaf(), TARGET)
    with pytest.raises(IndexError, match=r"label 4 at position \[5\]"):
        criterion(leaf(), torch.tensor([0, 3, 1, 1, 2, 4]))
    with pytest.raises(TypeError, match="got no target"):
        criterion(leaf())
    with pytest.raises(ValueError, match="sample_weight"):
        criterion(leaf(), TARGET, sample_weight=torch.tensor([-1.0] * 6))
    with pytest.raises(TypeError, match=r"must be a torch\.Tensor"):
        criterion(LOGITS.numpy(), TARGET)
    with pytest.raises(ValueError, match="move both to one device"):
        criterion(leaf(), TARGET.to("meta"))


def test_second_derivatives_kept_graphs_and_changed_inputs(ways):
    criterion = RGDLoss(scale=-0.7)
    criterion(leaf(), TARGET)

    def hessian(of):
        x = leaf()
        (first,) = torch.autograd.grad(of(x, TARGET), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    equal_to = hessian(RGDLoss(scale=-0.7))
    torch.testing.assert_close(hessian(criterion), equal_to, rtol=0, atol=0)
    x = leaf()
    objective = criterion(x, TARGET)
    first, second = (torch.autograd.grad(objective, x, retain_graph=True)[0] for _ in range(2))
    assert first.data_ptr() != second.data_ptr()
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    y = leaf()
    objective = criterion(y, TARGET)
    with torch.no_grad():
        y.mul_(2)
    (first,) = torch.autograd.grad(objective, y, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(objective, y, create_graph=True)
    assert ways == [True] * 3


def test_a_copy_and_a_pickle_begin_anew():
    criterion = RGDLoss()
    criterion(leaf(), TARGET)
    assert criterion._accepted is not None
    for other in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert other._accepted is None
        equal(result(other), result(RGDLoss()))


def test_a_compiled_loss_does_not_see_what_eager_calls_leave_behind():
    criterion = RGDLoss()
    criterion(leaf(), TARGET)
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(criterion, backend=counter, fullgraph=True)
    for eager in (LOGITS, LOGITS.double(), LOGITS):
        assert compiled(leaf(), TARGET).item() == pytest.approx(RGDLoss()(LOGITS, TARGET).item())
        criterion(leaf(eager), TARGET)
    assert counter.frame_count == 1


def test_threads_share_a_loss():
    criterion = RGDLoss()
    calls = [(LOGITS, TARGET), (LOGITS[:3], TARGET[:3]), (LOGITS.double(), TARGET)]
    expected = [RGDLoss()(*call).item() for call in calls]
    wrong = []

    def train(mine):
        for _ in range(200):
            logits, target = calls[mine]
            if criterion(leaf(logits), target).item() != expected[mine]:
                wrong.append(mine)

    threads = [threading.Thread(target=train, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_each_value_of_none_has_its_own_gradient_and_is_marked_as_weighted(ways):
    criterion = RGDLoss(scale=-0.7, reduction="none")
    above = torch.arange(1.0, 7.0)
    criterion(leaf(), TARGET)
    x = leaf()
    values = criterion(x, TARGET)
    (gradient,) = torch.autograd.grad(values, x, above, create_graph=True)
    expected = F.cross_entropy(y := leaf(), TARGET, reduction="none") * torch.exp(
        -0.7 * F.cross_entropy(LOGITS, TARGET, reduction="none")
    )
    (of_formula,) = torch.autograd.grad(expected, y, above)
    torch.testing.assert_close((values, gradient), (expected, of_formula))
    with pytest.raises(ValueError, match="weighted already"):
        reweighted_mean(values)
    assert ways == [True]


# --- cross_entropy: the arguments of the last calls of this thread ---

SETTINGS = {
    "plain": {},
    "dial": {"scale": -0.7},
    "none": {"reduction": "none"},
    "weights": {"weight": torch.tensor([1.0, 2.0, 0.5, 3.0]), "ignore_index": 1, "label_smoothing": 0.1},
    "adjusted": {"logit_adjustment": torch.tensor([0.0, 1.0, -1.0, 0.5]), "reduction": "sum", "z_loss": 0.1},
    "member": {"weighting": rgd.CVaR(0.5)},
    "masked": {"where": MASK},
    "shares": {"sample_weight": SHARES, "groups": GROUPS},
}


def of_function(**settings):
    x = leaf()
    values = cross_entropy(x, TARGET, **settings)
    (gradient,) = torch.autograd.grad(values, x, torch.full_like(values, 3.0))
    return values, gradient


@pytest.mark.parametrize("name", list(SETTINGS))
def test_the_third_call_of_the_function_takes_the_short_way_to_the_same_numbers(function_ways, name):
    calls = [of_function(**SETTINGS[name]) for _ in range(4)]
    assert function_ways == [True, True]
    for call in calls[1:]:
        torch.testing.assert_close(call, calls[0], rtol=0, atol=0)


OTHER_ARGUMENTS = {
    "reduction": {"reduction": "sum"},
    "ignore_index": {"ignore_index": 1},
    "label_smoothing": {"label_smoothing": 0.2},
    "z_loss": {"z_loss": 0.1},
    "tau": {"tau": 0.5},
    "weighting": {"weighting": rgd.CVaR(0.5)},
    "weight": {"weight": torch.tensor([1.0, 2.0, 0.5, 3.0])},
    "adjustment": {"logit_adjustment": torch.tensor([0.0, 1.0, -1.0, 0.5])},
    "per": {"per": "sample"},
    "two narrow masks": {"where": torch.stack([MASK, MASK], 1)[:, 0]},
}


@pytest.mark.parametrize("name", list(OTHER_ARGUMENTS))
def test_other_arguments_of_the_function_are_heard(function_ways, name):
    expected = of_function(**OTHER_ARGUMENTS[name])
    for _ in range(3):
        of_function()
    assert function_ways[-1]
    torch.testing.assert_close(of_function(**OTHER_ARGUMENTS[name]), expected, rtol=0, atol=0)
    assert not function_ways[-1]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"reduction": "median"}, ValueError, "reduction"),
        ({"ignore_index": True}, TypeError, "ignore_index"),
        ({"label_smoothing": 2.0}, ValueError, "label_smoothing"),
        ({"inplace": 1}, TypeError, "inplace"),
        ({"normalizer": -1.0}, ValueError, "normalizer"),
        ({"state": ()}, ValueError, "state"),
        ({"reference": torch.zeros(6)}, ValueError, "reference"),
        ({"num_segments": 3}, ValueError, "segments"),
        ({"sample_weight": -SHARES}, ValueError, "finite numbers >= 0"),
        ({"weight": torch.ones(3)}, ValueError, "weight"),
    ],
)
def test_what_the_function_refuses_is_refused_in_a_series_too(settings, error, message):
    for _ in range(3):
        of_function()
    with pytest.raises(error, match=message):
        of_function(**settings)


def test_a_class_weight_that_was_changed_in_place_counts_as_it_is(function_ways):
    weight = torch.tensor([1.0, 2.0, 0.5, 3.0])
    for _ in range(3):
        of_function(weight=weight)
    weight.mul_(torch.tensor([3.0, 1.0, 1.0, 1.0]))
    expected = of_function(weight=weight.clone())
    torch.testing.assert_close(of_function(weight=weight), expected, rtol=0, atol=0)
    assert function_ways[:2] == [True, False]


@pytest.mark.filterwarnings("ignore")  # torch.jit.trace warns of itself and of every shape
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "evaluation"])
def test_a_call_of_the_function_in_a_mode_goes_the_whole_way(function_ways, mode):
    class Called(nn.Module):
        def forward(self, logits, target):
            return cross_entropy(logits, target)

    expected = MODES[mode](Called())
    for _ in range(3):
        of_function()
    del function_ways[:]
    torch.testing.assert_close(MODES[mode](Called()), expected, rtol=0, atol=0)
    assert function_ways
    assert not any(function_ways)


def test_threads_have_their_own_series():
    expected = [of_function(), of_function(scale=-0.7)]
    wrong = []

    def train(mine):
        for _ in range(100):
            found = of_function() if mine == 0 else of_function(scale=-0.7)
            if found[0].item() != expected[mine][0].item():
                wrong.append(mine)

    threads = [threading.Thread(target=train, args=(i % 2,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --- losses of any kind ---

LOSSES = torch.tensor([0.1, 3.0, 0.7, 1.5, 0.0, 2.0])
MEMBERS = [rgd.KL(), rgd.KL(scale=-0.7), rgd.CVaR(0.5), rgd.KLBall(0.1), rgd.ERM()]


@pytest.mark.parametrize("weighting", MEMBERS, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_losses_of_a_base_take_the_short_way_to_the_same_numbers(ways_of_losses, weighting, reduction, dtype):
    criterion = RGDLoss(base=torch.abs, weighting=weighting, reduction=reduction)

    def call():
        x = leaf(LOSSES.to(dtype))
        values = criterion(x.view(2, 3))
        (first,) = torch.autograd.grad(values, x, torch.full_like(values, 3.0), retain_graph=True)
        (again,) = torch.autograd.grad(values.square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(again.sum(), x)
        stats = criterion.stats()
        return (values, first, again, second, criterion.last_weights), stats.mean_loss, stats.objective

    short, *told = call()
    assert ways_of_losses == [True]
    with backend("composite"):
        whole, *of_whole = call()
    assert ways_of_losses == [True, False]
    # Sums of six numbers, and weights of 4 ulp.
    torch.testing.assert_close(short, whole, rtol=32 * torch.finfo(dtype).eps, atol=0)
    assert told == pytest.approx(of_whole, rel=32 * torch.finfo(dtype).eps)


def test_an_infinite_loss_of_weight_0_adds_nothing_and_nan_stays_nan(ways_of_losses):
    for value, objective in ((torch.inf, LOSSES[:5].sum().item() / 6), (torch.nan, torch.nan)):
        x = leaf(torch.cat([LOSSES[:5], torch.tensor([value])]))
        found = reweighted_mean(x, rgd.Threshold(10.0))
        assert found.item() == pytest.approx(objective, nan_ok=True)
        (gradient,) = torch.autograd.grad(found, x)
        assert gradient[5] == 0 or value != torch.inf
        assert gradient[:5].tolist() == pytest.approx([1 / 6] * 5)
    assert ways_of_losses == [True, True]


ELSEWHERE = {
    "half": lambda: reweighted_mean(leaf(LOSSES.bfloat16())),
    "strided": lambda: reweighted_mean(leaf(LOSSES.repeat(2))[::2]),
    "negated": lambda: reweighted_mean(torch._neg_view(-leaf())),
    "no grad": lambda: reweighted_mean(LOSSES),
    "empty": lambda: reweighted_mean(leaf(LOSSES[:0])),
    "own weighting": lambda: reweighted_mean(leaf(LOSSES), rgd.Pointwise(torch.exp)),
    "subclass": lambda: reweighted_mean(LOSSES.as_subclass(Tagged).requires_grad_()),
    "func.grad": lambda: torch.func.grad(reweighted_mean)(LOSSES),
}


@pytest.mark.parametrize("case", list(ELSEWHERE))
def test_losses_that_the_kernels_do_not_read_as_they_are_go_the_whole_way(ways_of_losses, case):
    ELSEWHERE[case]()
    assert ways_of_losses == [False]


def test_per_sample_losses_of_rows_go_the_whole_way(ways_of_losses):
    criterion = RGDLoss(base=torch.abs, per="sample")
    criterion(leaf(LOSSES.view(2, 3)))
    criterion(leaf(LOSSES))
    assert ways_of_losses == [True]


def test_hooks_on_saved_tensors_send_losses_the_whole_way(ways_of_losses):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        reweighted_mean(leaf(LOSSES))
    assert ways_of_losses == [False]


def test_a_graph_of_losses_is_used_once_unless_it_is_kept():
    x = leaf(LOSSES)
    objective = reweighted_mean(x)
    first, second = (torch.autograd.grad(objective, x, retain_graph=True)[0] for _ in range(2))
    assert first.data_ptr() != second.data_ptr()
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    objective.backward()
    with pytest.raises(RuntimeError, match="second time"):
        objective.backward()


def test_gradients_of_many_directions_at_once():
    x = leaf(LOSSES)
    values = RGDLoss(base=torch.abs, reduction="none")(x)
    (rows,) = torch.autograd.grad(values, x, torch.eye(6), is_grads_batched=True)
    torch.testing.assert_close(rows, torch.diag(torch.exp(LOSSES.clamp(max=1.0) / 2) * LOSSES.sign()))


def test_an_optimizer_takes_the_short_way(ways_of_losses):
    x = leaf(LOSSES)
    optimizer = RGD(torch.optim.SGD([x], lr=1.0))
    optimizer.backward(x.abs())
    torch.testing.assert_close(x.grad, torch.exp(LOSSES.clamp(max=1.0) / 2) * LOSSES.sign() / 6)
    assert ways_of_losses == [True]
