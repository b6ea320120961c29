"""The records of calls, and the statistics that are computed from them on request."""

from rgd.torch.stats._record import Filled, Record, stats_by_group, sums_of, tail_of, times_power
from rgd.torch.stats._totals import Advisor, Totals, remark_on

__all__ = [
    "Advisor",
    "Filled",
    "Record",
    "Totals",
    "remark_on",
    "stats_by_group",
    "sums_of",
    "tail_of",
    "times_power",
]
