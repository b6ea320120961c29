"""Tests that take long: they start first, so that all workers end together, and `--quick` leaves them out.

`--few N` runs each test function with N of its parameter sets. So do the oldest versions: they differ in what
a function calls, not in the numbers it is given.

`tests/durations.json` holds the seconds of the longest run of each test function that takes 0.5 s or more.
On a quiet machine, `make test PYTEST_ARGS=--store-durations` brings it up to date.
"""

import collections
import json
import pathlib
import zlib

import pytest

TABLE = pathlib.Path(__file__).parents[1] / "durations.json"
LONG = 0.5


def pytest_addoption(parser):
    group = parser.getgroup("durations")
    group.addoption(
        "--quick",
        action="store_true",
        help=f"run each test with one of its parameter sets, and none of {LONG} s or with processes",
    )
    group.addoption("--few", type=int, metavar="N", help="run each test with at most N of its parameter sets")
    group.addoption(
        "--store-durations", action="store_true", help=f"write what takes {LONG} s or more to {TABLE.name}"
    )


def pytest_configure(config):
    if config.getoption("--store-durations") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(), "durations-recorder")


def function_of(nodeid):
    """The name of the test function: a file may be renamed."""
    return nodeid.partition("[")[0].rpartition("::")[2]


def chosen(items, number):
    """A number of evenly spaced items of each test function; the first depends only on its name."""
    variants = collections.defaultdict(list)
    for item in items:
        variants[item.nodeid.partition("[")[0]].append(item)
    kept = []
    for name, group in variants.items():
        first, number_here = zlib.crc32(name.encode()), min(number, len(group))
        kept += [group[(first + i * len(group) // number_here) % len(group)] for i in range(number_here)]
    return kept


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    seconds = json.loads(TABLE.read_text(encoding="utf-8"))
    if config.getoption("--quick"):
        # The processes of groups take seconds to start.
        kept = chosen(
            [
                item
                for item in items
                if function_of(item.nodeid) not in seconds and "workers" not in item.fixturenames
            ],
            number=1,
        )
        config.hook.pytest_deselected(items=list(set(items).difference(kept)))
        items[:] = kept
    elif config.getoption("--few"):
        kept = chosen(items, config.getoption("--few"))
        config.hook.pytest_deselected(items=list(set(items).difference(kept)))
        items[:] = kept
    longest = collections.defaultdict(float)
    for item in items:
        longest[item.path] = max(longest[item.path], seconds.get(function_of(item.nodeid), 0.0))
    # Whole files are moved: the tests of one share their fixtures.
    items.sort(key=lambda item: -longest[item.path])


class Recorder:
    """Writes the table from the reports of this run; functions that did not run keep their line."""

    def __init__(self):
        self.seconds = collections.defaultdict(float)

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] += report.duration

    def pytest_sessionfinish(self):
        longest = collections.defaultdict(float)
        for nodeid, seconds in self.seconds.items():
            longest[function_of(nodeid)] = max(longest[function_of(nodeid)], seconds)
        table = json.loads(TABLE.read_text(encoding="utf-8"))
        kept = {name: old for name, old in table.items() if name not in longest}
        new = {name: round(seconds, 1) for name, seconds in longest.items() if seconds >= LONG}
        text = json.dumps(dict(sorted({**kept, **new}.items())), indent=1)
        TABLE.write_text(text + "\n", encoding="utf-8")
