"""What the evidence programs share: arms, problems, training, the sweep, statistics, results, pictures.

The rules of a fair comparison are code here, so that a program cannot forget one:

- `sweep` tunes learning rate and weight decay of every arm on validation data, widens the grid until the
  best value lies inside it, and raises `EdgeError` where it cannot.
- `train` gives all arms of a seed the same data, initial networks and order of minibatches.
- `tuned` compares an arm that chose among m settings with plain training that got m times as many runs.
- `mean_one`, `times_mean_weight` and `opposite_sign` are the controls; every classifier is also scored
  after temperature scaling.
- `compare` takes differences seed by seed and calls nothing a finding whose p is not below .001.
"""

from harness.arms import Arm, Constant, MeanOne, mean_one, opposite_sign, times_mean_weight
from harness.problems import Classification, Data, Part, Problem, Regression, breast_cancer, digits
from harness.results import Result, Table
from harness.row import Row, Session, main, recipe
from harness.statistics import FINDING, Paired, compare, interval
from harness.store import Store
from harness.sweep import Chosen, EdgeError, Grid, sweep, tuned, untuned
from harness.train import Cell, Outcome, train

__all__ = [
    "FINDING",
    "Arm",
    "Cell",
    "Chosen",
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
    "Regression",
    "Result",
    "Row",
    "Session",
    "Store",
    "Table",
    "breast_cancer",
    "compare",
    "digits",
    "interval",
    "main",
    "mean_one",
    "opposite_sign",
    "recipe",
    "sweep",
    "times_mean_weight",
    "train",
    "tuned",
    "untuned",
]
