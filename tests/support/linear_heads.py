"""Hidden states, heads and targets of the tests of linear heads."""

import torch
from rgd.torch import cross_entropy, linear_cross_entropy
from torch.nn import functional as F

B, T, D, C = 3, 5, 6, 11


class Case:
    """Hidden states, a head and targets, and the two ways from them to an objective."""

    def __init__(self, dtype=torch.float64, rows=(B, T), *, classes=C, features=D, bias=True, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.input = normal(*rows, features).to(dtype).requires_grad_()
        self.weight = (normal(classes, features) / features**0.5 * 2).to(dtype).requires_grad_()
        self.bias = normal(classes).to(dtype).requires_grad_() if bias else None
        self.target = torch.randint(classes, rows, generator=generator)
        self.probabilities = torch.softmax(normal(*rows, classes), -1).to(dtype)
        self.class_weight = torch.rand(classes, generator=generator, dtype=torch.float64) + 0.5

    @property
    def trained(self):
        return [one for one in (self.input, self.weight, self.bias) if one is not None and one.requires_grad]

    def chunked(self, target=None, **options):
        target = self.target if target is None else target
        return linear_cross_entropy(self.input, self.weight, target, linear_bias=self.bias, **options)

    def whole(self, target=None, *, weight=None, logit_softcap=None, shift=False, **options):
        target = self.target if target is None else target
        logits = F.linear(self.input, self.weight, self.bias)
        if logit_softcap is not None:
            logits = logit_softcap * torch.tanh(logits / logit_softcap)
        if shift:
            logits, target = logits[:, :-1], target[:, 1:]
            for name in ("where", "sample_weight", "groups"):
                if options.get(name) is not None and options[name].dim() == 2:
                    options[name] = options[name][:, 1:]
        if logits.dim() > 2:
            logits = logits.movedim(-1, 1)
            target = target.movedim(-1, 1) if target.is_floating_point() else target
        return cross_entropy(logits, target, weight, **options)

    def results(self, way, *arguments, order=1, **options):
        """The objective, and the gradients of a weighted sum of its elements in the trained tensors.

        With `order` 2, also the gradients of the sum of the squares of these gradients.
        """
        for one in self.trained:
            one.grad = None
        objective = way(*arguments, **options)
        above = torch.linspace(1.0, 2.0, objective.numel(), dtype=objective.dtype)
        total = (objective * above.view(objective.shape)).sum()
        if order == 2:
            first = torch.autograd.grad(total, self.trained, create_graph=True)
            second = torch.autograd.grad(sum(one.square().sum() for one in first), self.trained)
            return [objective.detach(), *(one.detach() for one in first), *second]
        total.backward()
        return [objective.detach(), *(one.grad for one in self.trained)]


def distance(actual, expected):
    """The largest of the differences, each over the norm of the expected tensor."""
    pairs = zip(actual, expected, strict=True)
    return max(((a - e).norm() / max(float(e.norm()), 1e-300)).item() for a, e in pairs)


def same(case, *arguments, tolerance=1e-12, chunk_bytes=None, **options):
    expected = case.results(case.whole, *arguments, **options)
    actual = case.results(case.chunked, *arguments, chunk_bytes=chunk_bytes, **options)
    assert [a.dtype for a in actual] == [e.dtype for e in expected]
    assert distance(actual, expected) <= tolerance
