"""`z_loss=` against the formula written out over all logits, in float64."""

import itertools

import pytest
import rgd
import torch
from rgd.torch import LinearRGDLoss, RGDLoss, backend, cross_entropy, linear_cross_entropy
from torch.nn import functional as F

N, T, C, D, Z = 6, 4, 7, 5, 0.05
MEMBERS = [rgd.KL(), rgd.Focal(2.0), rgd.CVaR(0.5)]
BACKENDS = ["rust", "composite"]
OPTIONS = {
    "plain": {},
    "classes": {"weight": torch.linspace(0.5, 2.0, C, dtype=torch.float64), "label_smoothing": 0.1},
    "adjusted": {"logit_adjustment": torch.linspace(-1.0, 1.0, C, dtype=torch.float64)},
    "by sample": {"per": "sample"},
    "weighted": {"sample_weight": torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0, 3.0], dtype=torch.float64)},
}


def batch(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, T, D, generator=generator, dtype=dtype)
    head = torch.randn(C, D, generator=generator, dtype=dtype)
    target = torch.randint(0, C, (N, T), generator=generator)
    target[0, 1] = target[2, 3] = -100
    return hidden, head, target


def expected(logits, target, weighting, reduction, options):
    """The objective as the docstring writes it, for logits (N, C, T)."""
    plain = cross_entropy(logits, target, weighting=weighting, reduction="none", **options)
    adjustment = options.get("logit_adjustment")
    logits = logits if adjustment is None else logits + adjustment.view(-1, 1)
    counted = target != -100
    p = options.get("sample_weight", torch.ones(N, dtype=logits.dtype)).view(-1, 1)
    extra = (p * Z * logits.logsumexp(1).square()).masked_fill(~counted, 0)
    if reduction == "none":
        return plain + extra
    if reduction == "sum":
        return (plain + extra).sum()
    c = options.get("weight", torch.ones(C, dtype=logits.dtype))
    return (plain + extra).sum() / (p * c[target.masked_fill(~counted, 0)]).masked_fill(~counted, 0).sum()


def results(loss, inputs):
    objective = loss(*inputs)
    slope = torch.linspace(0.5, 1.5, objective.numel(), dtype=objective.dtype).view(objective.shape)
    return objective.detach(), *torch.autograd.grad((objective * slope).sum(), inputs)


def assert_same(mine, other, tolerance=1e-12):
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", BACKENDS)
def test_the_objective_and_its_gradient_are_the_formula(kind, reduction, name):
    hidden, head, target = batch()
    options = OPTIONS[name]
    logits = F.linear(hidden, head).movedim(-1, 1).requires_grad_()
    inputs = hidden.requires_grad_(), head.requires_grad_()
    for weighting in MEMBERS:
        settings = {"weighting": weighting, "reduction": reduction, **options}

        def whole(h, w, weighting=weighting):
            return expected(F.linear(h, w).movedim(-1, 1), target, weighting, reduction, options)

        with backend(kind):
            mine = results(lambda x, s=settings: cross_entropy(x, target, z_loss=Z, **s), (logits,))
            other = results(lambda x, w=weighting: expected(x, target, w, reduction, options), (logits,))
            assert_same(mine, other)

            def chunked(h, w, settings=settings):
                return linear_cross_entropy(h, w, target, z_loss=Z, chunk_bytes=3 * C * 8, **settings)

            assert_same(results(chunked, inputs), results(whole, inputs))


@pytest.mark.parametrize("kind", BACKENDS)
def test_weights_and_statistics_see_the_cross_entropy_alone(kind):
    hidden, _, target = batch()
    head = LinearRGDLoss(D, C, dtype=torch.float64), LinearRGDLoss(D, C, dtype=torch.float64, z_loss=Z)
    head[1].load_state_dict(head[0].state_dict())
    logits = torch.randn(N, C, T, dtype=torch.float64, requires_grad=True)
    for (plain, with_z), inputs in (
        ((RGDLoss(), RGDLoss(z_loss=Z)), logits),
        (head, hidden.requires_grad_()),
    ):
        with backend(kind):
            assert with_z(inputs, target) > plain(inputs, target)
        assert with_z.stats() == plain.stats()
        with torch.no_grad():  # an evaluation
            assert with_z(inputs, target) == plain(inputs, target)


@pytest.mark.parametrize("kind", BACKENDS)
@pytest.mark.parametrize(
    ("weighting", "reductions"), [(rgd.KL(), ["mean", "none"]), (rgd.CVaR(0.5), ["mean"])], ids=str
)
def test_compiled_graphs_and_second_derivatives_give_the_same(kind, weighting, reductions):
    hidden, head, target = batch()
    logits = F.linear(hidden, head).movedim(-1, 1).requires_grad_()
    inputs = hidden.requires_grad_(), head.requires_grad_()
    for reduction in reductions:
        settings = {"weighting": weighting, "reduction": reduction, "z_loss": Z}

        def dense(x, settings=settings):
            return cross_entropy(x, target, **settings)

        def linear(h, w, settings=settings):
            return linear_cross_entropy(h, w, target, **settings)

        with backend(kind):
            for loss, given in ((dense, (logits,)), (linear, inputs)):
                torch._dynamo.reset()
                graph = torch.compile(loss, fullgraph=True, backend="aot_eager")
                assert_same(results(graph, given), results(loss, given))

        def second(loss, given):
            first = torch.autograd.grad(loss(*given).sum(), given, create_graph=True)
            return torch.autograd.grad(sum(one.square().sum() for one in first), given)

        with backend(kind):
            mine = second(dense, (logits,)), second(linear, inputs)
        with backend("composite"):
            other = (
                second(dense, (logits,)),
                second(lambda h, w, loss=dense: loss(F.linear(h, w).movedim(-1, 1)), inputs),
            )
        for a, b in zip(itertools.chain(*mine), itertools.chain(*other), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", BACKENDS)
def test_over_the_logits(kind):
    hidden, head, target = batch()
    head = head.requires_grad_()
    for weighting in (rgd.KL(), rgd.CVaR(0.5)):
        found = []
        for inplace in (False, True):
            logits = F.linear(hidden.detach(), head).movedim(-1, 1)
            with backend(kind):
                value = cross_entropy(logits, target, weighting=weighting, z_loss=Z, inplace=inplace)
            found.append((value.detach(), *torch.autograd.grad(value, head)))
        assert_same(*found)


def test_what_is_no_z_loss_is_refused():
    for wrong in (-1e-4, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="z_loss must be a finite number >= 0"):
            RGDLoss(z_loss=wrong)
    for wrong in ("1e-4", None, True):
        with pytest.raises(TypeError, match="z_loss must be a number"):
            LinearRGDLoss(D, C, z_loss=wrong)
    with pytest.raises(ValueError, match="z_loss is a setting of the built-in cross-entropy"):
        RGDLoss(base=torch.nn.MSELoss(reduction="none"), z_loss=1e-4)
