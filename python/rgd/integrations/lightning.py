"""A callback for Lightning that logs statistics of the weights.

The loss does not need this module: write `self.criterion = RGDLoss()` in a `LightningModule`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from torch import nn

from rgd.torch.loss import RGDLoss

if TYPE_CHECKING:
    import lightning.pytorch as pl
else:
    try:
        import lightning.pytorch as pl
    except ImportError:  # the package under its older name
        import pytorch_lightning as pl


class RGDStats(pl.Callback):
    """Logs `stats()` of every `RGDLoss` in the `LightningModule`, at the steps that the trainer logs.

    The names are `rgd/mean_loss` (the plain loss, by which to compare runs), `rgd/objective`,
    `rgd/effective_sample_size`, `rgd/kl_to_uniform`, `rgd/max_weight` and `rgd/clipped_share`; with several
    losses, `rgd/<name of the loss>/mean_loss` and so on. `rgd.WeightStats` says what they mean. The
    statistics are computed only every `Trainer(log_every_n_steps=...)` steps, and cost nothing at other
    steps.

    Args:
        prefix: What the names begin with.
        sync_dist: Whether the numbers are averaged over processes; else those of the first process are
            logged.

    Raises:
        ValueError: When the training starts, if the module has no `RGDLoss`.

    Example:
        >>> import lightning.pytorch as pl
        >>> trainer = pl.Trainer(callbacks=[RGDStats()])  # doctest: +SKIP
    """

    def __init__(self, prefix: str = "rgd", *, sync_dist: bool = False) -> None:
        super().__init__()
        self.prefix = prefix
        self.sync_dist = sync_dist

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a module without an `RGDLoss`."""
        if not _losses(pl_module):
            raise ValueError(
                f"{type(pl_module).__name__} has no RGDLoss to log the statistics of: make the loss a part "
                "of the module, self.criterion = RGDLoss(), and call that in training_step"
            )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the statistics of the batch that ended, if this step is logged."""
        if trainer.global_step % cast("Any", trainer).log_every_n_steps:
            return
        losses = _losses(pl_module)
        for name, criterion in losses.items():
            try:
                stats = criterion.stats()
            except RuntimeError:  # this one has not been called yet
                continue
            prefix = self.prefix if len(losses) == 1 else f"{self.prefix}/{name}"
            values = {
                f"{prefix}/{key}": float(value)
                for key, value in vars(stats).items()
                if value is not None and key not in ("count", "groups")
            }
            pl_module.log_dict(
                values, on_step=True, on_epoch=False, sync_dist=self.sync_dist, batch_size=max(stats.count, 1)
            )


def _losses(module: nn.Module) -> dict[str, RGDLoss]:
    return {name: m for name, m in cast("Any", module).named_modules() if isinstance(m, RGDLoss)}
