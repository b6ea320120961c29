"""What `sample_weight=`, `where=` and `groups=` refuse, and calls in which values cannot be read."""

import pytest
import torch
import torch.nn.functional as F
from base_measures import INF, NAN, SOME, base_measure, losses_of, mask, run
from family import members
from rgd import ERM, KL, CVaR, Focal, GroupDRO, Trimmed
from rgd.torch import RGD, RGDLoss, backend, cross_entropy, reweighted_mean, sample_weights, weight_stats
from rgd.torch._operators import flattened
from rgd.torch._plan import Plan
from rgd.torch._problem import Options, Problem
from torch_family import (
    GROUPS,
    N,
    T,
    assert_same_stats,
    both_backends,
    problem,
)

# --- refusals ---


LOGITS, TARGET = torch.zeros(4, 3), torch.arange(4) % 3
CALLS = {
    "sample_weights": lambda **k: sample_weights(torch.ones(4), **k),
    "reweighted_mean": lambda **k: reweighted_mean(torch.ones(4), **k),
    "cross_entropy": lambda **k: cross_entropy(LOGITS, TARGET, **k),
    "cross_entropy by sample": lambda **k: cross_entropy(LOGITS, TARGET, per="sample", **k),
    "RGDLoss": lambda **k: RGDLoss()(LOGITS, TARGET, **k),
    "RGDLoss of a base": lambda **k: RGDLoss(base=lambda x: x)(torch.ones(4), **k),
    "RGD.objective": lambda **k: RGD(torch.optim.SGD([torch.ones(1)], lr=1.0)).objective(torch.ones(4), **k),
    "RGD.backward": lambda **k: RGD(torch.optim.SGD([torch.ones(1)], lr=1.0)).backward(torch.ones(4), **k),
    "weight_stats": lambda **k: weight_stats(torch.ones(4), torch.ones(4), **k),
}
calls = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@calls
@both_backends
@pytest.mark.parametrize("wrong", [-1.0, -1e-30, NAN, INF, -INF])
def test_numbers_that_are_no_measure_are_refused(call, name, wrong):
    p = torch.tensor([1.0, 0.0, wrong, 2.0])
    with backend(name), pytest.raises(ValueError, match="sample_weight must hold finite numbers >= 0, got "):
        call(sample_weight=p)
    if wrong == -1.0:
        with backend(name), pytest.raises(ValueError, match=r"finite numbers >= 0, got -1\.0"):
            call(sample_weight=p.int())


@calls
def test_a_measure_of_the_wrong_kind_is_refused_in_words_that_help(call):
    ones = torch.ones(4)
    for wrong, error, said in [
        ([1.0] * 4, TypeError, r"sample_weight must be a torch\.Tensor, got list: pass torch\.as_tensor"),
        (1.0, TypeError, r"sample_weight must be a torch\.Tensor, got float"),
        (ones > 0, TypeError, r"sample_weight must hold numbers, got torch\.bool"),
        (ones + 0j, TypeError, r"sample_weight must hold numbers, got torch\.complex64"),
        (ones[:3], ValueError, r"sample_weight must have the shape of the losses, \(4,\), .* got \(3,\)"),
        (ones[:, None], ValueError, r"sample_weight must have .* got \(4, 1\)"),
        (ones[0], ValueError, r"sample_weight must have .* got \(\)"),
        (
            ones.to("meta"),
            ValueError,
            r"losses are on cpu and sample_weight on meta: move both to one device",
        ),
    ]:
        if "shape of the losses" in said and call is CALLS["cross_entropy by sample"]:
            said = r'sample_weight must have one entry a sample, shape \(4,\), with per="sample", got \(3,\)'  # noqa: PLW2901
        with pytest.raises(error, match=said):
            call(sample_weight=wrong)


def test_by_sample_a_measure_of_the_targets_is_refused():
    logits, target, _, _ = problem("indices")
    said = r'one entry a sample, shape \(9,\), with per="sample", got \(9, 3\)'
    with pytest.raises(ValueError, match=f"sample_weight must have {said}"):
        RGDLoss(per="sample")(logits, target, sample_weight=torch.ones(N, T))
    with pytest.raises(ValueError, match=f"groups must have {said}"):
        RGDLoss(per="sample")(logits, target, groups=torch.ones(N, T, dtype=torch.int64))


@pytest.mark.parametrize("call", list(CALLS.values())[:-1], ids=list(CALLS)[:-1])
def test_a_mask_of_the_wrong_kind_is_refused(call):
    for wrong, error, said in [
        (torch.ones(4), TypeError, r"where must be a torch\.Tensor of bool, got torch\.float32"),
        ([True] * 4, TypeError, r"where must be a torch\.Tensor of bool, got list"),
        (
            torch.ones(3, dtype=torch.bool),
            ValueError,
            r"where must have the shape of the losses, \(4,\), got \(3,\)",
        ),
        (torch.ones(4, dtype=torch.bool, device="meta"), ValueError, r"on cpu and where on meta"),
    ]:
        with pytest.raises(error, match=said):
            call(where=wrong)


def test_extra_arguments_without_a_base_are_refused():
    with pytest.raises(TypeError, match=r"takes input and target \(and where=, sample_weight=, \.\.\.\)"):
        RGDLoss()(LOGITS, TARGET, torch.ones(4))


# --- where values cannot be read ---


@members([KL(1.0), Focal(2.0), CVaR(0.5)])
def test_compiled_or_vmapped_a_wrong_number_gives_nan_instead_of_an_answer(weighting):
    losses = losses_of((4,))

    def weigh(losses, p):
        return sample_weights(losses, weighting, sample_weight=p)

    def mean(losses, p):
        return reweighted_mean(losses, weighting, sample_weight=p)

    def classified(losses, p):
        logits = torch.stack([losses, -losses], 1)
        return cross_entropy(logits, torch.zeros(4, dtype=torch.int64), weighting=weighting, sample_weight=p)

    torch.compiler.reset()
    for function in (weigh, mean, classified):
        compiled = torch.compile(function, backend="eager", fullgraph=True)
        for wrong in (-1.0, NAN, INF):
            p = torch.tensor([1.0, wrong, 0.0, 2.0])
            if weighting == KL(1.0):
                assert compiled(losses, p).isnan().any()
            mapped = torch.vmap(function)(losses[None], p[None])[0]
            assert mapped.isnan().any()
            if function is weigh:
                assert mapped[1].isnan()
                assert mapped[2] == 0


# torch's compiler reads the gradient of tensors that have none.
reads_gradients = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


@reads_gradients
@pytest.mark.parametrize("per", ["element", "sample"])
@members([KL(1.0), Trimmed(KL(1.0, normalize=True), 0.25), GroupDRO(GROUPS, 0.5)])
def test_compiled_base_measure_mask_and_groups_give_what_they_do_eagerly(weighting, per):
    torch.compiler.reset()
    logits, target, class_weight, _ = problem("indices")
    plain, criterion = (RGDLoss(class_weight, weighting=weighting, per=per) for _ in range(2))
    compiled = torch.compile(criterion, backend="aot_eager", fullgraph=True)
    given = {"sample_weight": base_measure(per), "where": mask(per), "groups": torch.arange(N) % GROUPS}
    for _ in range(2):
        mine, theirs = (
            run(lambda x, loss=loss: loss(x, target, **given), logits, ERM()) for loss in (compiled, plain)
        )
        for got, expected in zip(mine[:2], theirs[:2], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-16)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(criterion.state_dict()[key], value, rtol=1e-14, atol=0)
    assert_same_stats(criterion.stats(), plain.stats(), N * T)


@reads_gradients
@pytest.mark.parametrize("per", ["element", "sample"])
def test_the_operators_with_a_base_measure_pass_opcheck(per):
    logits, target, class_weight, _ = problem("indices")
    losses = F.cross_entropy(logits, target, class_weight, label_smoothing=0.1, reduction="none")
    weights = torch.ones_like(losses[:, 0] if per == "sample" else losses)
    options, plan, operators = Options(label_smoothing=0.1, per=per), Plan(KL(1.0)), torch.ops.rgd
    given = Problem(
        logits.requires_grad_(), target, options, class_weight=class_weight, measure=base_measure(per)
    )
    plain = flattened(given.changed(logits=logits.detach()))
    given = flattened(given)
    torch.library.opcheck(operators.cross_entropy.default, (*given, True, plan.kind, plan.numbers))
    torch.library.opcheck(operators.cross_entropy_gradient.default, (*given, True, losses, weights, None))
    torch.library.opcheck(operators.cross_entropy_losses.default, plain)


def test_meta_tensors_get_the_shape():
    logits, target = torch.empty(4, 3, 2, device="meta"), torch.empty(4, 2, dtype=torch.int64, device="meta")
    p = torch.empty(4, device="meta")
    for weighting in SOME:
        value = cross_entropy(logits, target, weighting=weighting, sample_weight=p, reduction="none")
        assert value.shape == (4, 2)
        assert sample_weights(logits, weighting, sample_weight=p).shape == (4, 3, 2)
