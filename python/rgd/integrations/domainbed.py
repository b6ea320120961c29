"""Algorithm classes of Re-weighted Gradient Descent for DomainBed and SubpopBench.

Each is a mixin for the suite's own `ERM`. Neither suite is imported here.

```py
# domainbed/algorithms.py, after ERM; add "RGD" to ALGORITHMS
class RGD(rgd.integrations.domainbed.DomainBedRGD, ERM): ...

# subpopbench/learning/algorithms.py, after ERM; add "RGD" to ALGORITHMS
class RGD(rgd.integrations.domainbed.SubpopBenchRGD, ERM): ...
```

References:
    Gulrajani, Lopez-Paz, "In Search of Lost Domain Generalization", ICLR 2021 (DomainBed).
    Yang, Zhang, Katabi, Ghassemi, "Change is Hard: A Closer Look at Subpopulation Shift", ICML 2023
    (SubpopBench).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from rgd.torch.loss import RGDLoss
from rgd.weightings import Weighting
from rgd.weightings._call import resolve_weighting


class _Reweighted(nn.Module):
    """The base of both mixins: makes the criterion, from the class's weighting or from the hyperparameters.

    Attributes:
        weighting: Turns losses into weights. None: `KL(tau=hparams["rgd_tau"])`, with `tau=1.0` where
            the hyperparameters have no `rgd_tau`. Set it in the subclass, or override `make_weighting`.
        criterion: The loss, `RGDLoss(weighting=...)`; a submodule, so that a weighting's state is saved with
            the algorithm.
    """

    weighting: ClassVar[Weighting | None] = None
    criterion: RGDLoss

    def make_weighting(self, hparams: Mapping[str, Any], groups: int) -> Weighting:
        """What turns losses into weights; called once, at construction.

        Args:
            hparams: The suite's hyperparameters.
            groups: The number of groups, for `rgd.GroupDRO`: domains in DomainBed, pairs of class and
                attribute in SubpopBench.

        Returns:
            The weighting.
        """
        if self.weighting is not None and "rgd_tau" in hparams:
            raise ValueError(
                f"{type(self).__name__} has weighting = {self.weighting}, and hparams['rgd_tau'] would "
                "change nothing: remove one of the two, or override make_weighting(hparams, groups)"
            )
        return resolve_weighting(self.weighting, hparams.get("rgd_tau"))


class DomainBedRGD(_Reweighted):
    """RGD as an algorithm of DomainBed: to be mixed into its `ERM`, or a class with its interface.

    The class it is mixed into needs `predict(x)` and `optimizer`, as `ERM` has. `update` takes one step on
    the minibatches of all domains together; the domain of a sample, counted in the order of the minibatches,
    is its group.

    Attributes:
        weighting: Turns losses into weights; None: `KL(tau=hparams["rgd_tau"])`, by default `tau=1.0`.

    Example:
        >>> import rgd, torch
        >>> class ERM(torch.nn.Module):  # in the place of domainbed.algorithms.ERM
        ...     def __init__(self, input_shape, num_classes, num_domains, hparams):
        ...         super().__init__()
        ...         self.network = torch.nn.Linear(input_shape[0], num_classes)
        ...         self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.1)
        ...     def predict(self, x):
        ...         return self.network(x)
        >>> class RGD(DomainBedRGD, ERM): ...
        >>> class WorstTenth(DomainBedRGD, ERM):
        ...     weighting = rgd.CVaR(0.1)
        >>> algorithm = RGD((5,), 3, 2, {"rgd_tau": 2.0})
        >>> minibatches = [(torch.randn(4, 5), torch.arange(4) % 3) for _ in range(2)]
        >>> sorted(algorithm.update(minibatches))
        ['ess', 'loss', 'plain_loss']
    """

    def __init__(
        self, input_shape: Any, num_classes: int, num_domains: int, hparams: Mapping[str, Any]
    ) -> None:
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self.criterion = RGDLoss(weighting=self.make_weighting(hparams, num_domains))

    def update(
        self, minibatches: Sequence[tuple[Tensor, Tensor]], unlabeled: Sequence[Tensor] | None = None
    ) -> dict[str, float]:
        """One step on the minibatches of all domains.

        Args:
            minibatches: Inputs and targets, a pair for each domain.
            unlabeled: Unused, as in `ERM`.

        Returns:
            `loss`, the re-weighted objective; `plain_loss`, the mean loss, which `ERM` reports as `loss`;
            `ess`, the effective sample size as a share of the samples.
        """
        algorithm = cast("Any", self)
        inputs = torch.cat([x for x, _ in minibatches])
        target = torch.cat([y for _, y in minibatches])
        domain = torch.cat([torch.full_like(y, number) for number, (_, y) in enumerate(minibatches)])
        loss = self.criterion(algorithm.predict(inputs), target, groups=domain)
        algorithm.optimizer.zero_grad()
        loss.backward()
        algorithm.optimizer.step()
        stats = self.criterion.stats()
        return {
            "loss": loss.item(),
            "plain_loss": stats.mean_loss,
            "ess": stats.effective_sample_size / stats.count,
        }


class SubpopBenchRGD(_Reweighted):
    """RGD as an algorithm of SubpopBench: to be mixed into its `ERM`, or a class with its interface.

    It changes the loss alone: `update(minibatch, step)` stays that of the class it is mixed into, with its
    optimizer, gradient clipping and learning rate schedule. Its `predict(x)` gives the logits. The group of a
    sample is `y * num_attributes + a`, as in the suite.

    Attributes:
        weighting: Turns losses into weights; None: `KL(tau=hparams["rgd_tau"])`, by default `tau=1.0`.

    Example:
        >>> import rgd
        >>> class ERM: ...  # in the place of subpopbench.learning.algorithms.ERM
        >>> class RGD(SubpopBenchRGD, ERM): ...
        >>> class WrongLabels(SubpopBenchRGD, ERM):
        ...     weighting = rgd.KL(scale=-0.7)
    """

    num_classes: int
    num_attributes: int
    hparams: Mapping[str, Any]

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.criterion = RGDLoss(
            weighting=self.make_weighting(self.hparams, self.num_classes * self.num_attributes)
        )

    def _compute_loss(self, i: Tensor, x: Tensor, y: Tensor, a: Tensor, step: int) -> Tensor:
        """The re-weighted loss of a minibatch: indices, inputs, targets, attributes."""
        logits = cast("Any", self).predict(x)
        return self.criterion(logits, y, groups=y * self.num_attributes + a)
