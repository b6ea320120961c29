"""What the evidence programs share: arms, problems, training, the sweep, statistics, results, pictures.

The rules of a fair comparison are code here, so that a program cannot forget one:

- `sweep` tunes learning rate and weight decay of every arm, each seed for itself on its own validation part,
  widens the grid until the best value lies inside it, and raises `EdgeError` where it cannot.
- `train` gives all arms of a seed the same data, initial networks and order of minibatches.
- `tuned` chooses among m settings; it is compared with plain training that chose among m starts.
- `mean_one`, `times_mean_weight` and `opposite_sign` are the controls; every classifier is also scored
  after temperature scaling.
- `compare` takes differences seed by seed. `Claim` is the one thing a program says in advance; `holm`
  corrects its p for the number of programs.
"""

from harness.arms import Arm, Constant, MeanOne, Ramp, mean_one, opposite_sign, times_mean_weight
from harness.problems import Classification, Data, Part, Problem, Regression, breast_cancer, digits, mnist1d
from harness.results import Result, Table
from harness.row import Claim, Reported, Row, Session, main, recipe
from harness.statistics import Paired, compare, holm, interval
from harness.store import Store
from harness.sweep import Choice, Chosen, EdgeError, Grid, retrained, sweep, tuned, untuned
from harness.train import Cell, Outcome, train

__all__ = [
    "Arm",
    "Cell",
    "Choice",
    "Chosen",
    "Claim",
    "Classification",
    "Constant",
    "Data",
    "EdgeError",
    "Grid",
    "MeanOne",
    "Outcome",
    "Paired",
    "Part",
    "Problem",
    "Ramp",
    "Regression",
    "Reported",
    "Result",
    "Row",
    "Session",
    "Store",
    "Table",
    "breast_cancer",
    "compare",
    "digits",
    "holm",
    "interval",
    "main",
    "mean_one",
    "mnist1d",
    "opposite_sign",
    "recipe",
    "retrained",
    "sweep",
    "times_mean_weight",
    "train",
    "tuned",
    "untuned",
]
