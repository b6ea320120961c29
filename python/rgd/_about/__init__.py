"""What `python -m rgd` prints: versions, machine, backends, a self-check, and on request a table of times."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from typing import Any

from rgd._about._check import check
from rgd._about._installed import backends, machine, versions
from rgd._about._times import steps

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report.

    Args:
        arguments: The arguments of the command line; None for those of the process.

    Returns:
        The exit code: 0, or 1 where a library cannot be imported, a front has no backend, or a number differs
        from the oracle's.
    """
    parser = argparse.ArgumentParser(
        prog="python -m rgd",
        description="Print versions, machine and active backends, and compare results with the oracle.",
    )
    parser.add_argument(
        "--bench", action="store_true", help="time RGDLoss beside nn.CrossEntropyLoss, at most two minutes"
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    given = parser.parse_args(arguments)

    # Versions come first: later parts leave out the libraries that cannot be imported.
    found: dict[str, Any] = {"versions": versions()}
    found["machine"] = machine()
    found["backends"] = backends()
    start = time.perf_counter()
    found["self_check"] = [result._asdict() for result in check()]
    found["self_check_seconds"] = round(time.perf_counter() - start, 2)
    broken = [one for one in found["versions"] if one["error"]]
    served = all(one["active"] for one in found["backends"])
    found["ok"] = served and not broken and all(one["problem"] is None for one in found["self_check"])
    if given.bench:
        found["bench"] = steps()
    print(json.dumps(found, indent=1) if given.json else _in_words(found))
    return 0 if found["ok"] else 1


def _in_words(found: dict[str, Any]) -> str:
    lines = ["versions"]
    lines += _columns(
        (one["name"], one["error"] or one["version"] or "not installed") for one in found["versions"]
    )
    lines += ["", "machine"]
    lines += _columns((name.replace("_", " "), str(value)) for name, value in found["machine"].items())
    lines += ["", "backends"]
    for one in found["backends"]:
        lines += _columns([(f"{one['front']} on {one['device']}", one["active"] or "none")])
        lines += [f"    not {name}: {reason}" for name, reason in one["others"].items()]
    lines += ["", f"self-check against the float64 oracle ({found['self_check_seconds']} s)"]
    lines += _columns((one["what"], one["problem"] or "ok") for one in found["self_check"])
    if "bench" in found:
        lines += ["", *_table(found["bench"])]
    lines += ["", "ok" if found["ok"] else "NOT ok: see above"]
    return "\n".join(lines)


def _columns(rows: Any) -> list[str]:
    pairs = list(rows)
    width = max((len(name) for name, _ in pairs), default=0)
    return [f"  {name:<{max(width, 18)}}  {value}" for name, value in pairs]


def _table(bench: dict[str, Any]) -> list[str]:
    """The times as a table."""
    if bench["problem"]:
        return [f"bench: {bench['problem']}"]
    lines = [
        f"forward and backward, float32, CPU, {bench['threads']} threads",
        "ratio: RGDLoss over nn.CrossEntropyLoss in turn, median (quartiles)",
        "",
        f"  {'N x C':>14}  {'RGDLoss':>10}  {'CrossEntropyLoss':>16}  {'ratio':<18}  pairs",
    ]
    for row in bench["rows"]:
        size = f"{row['samples']} x {row['classes']}"
        low, median, high = row["ratio"]
        ratio = f"{median:.2f} ({low:.2f} to {high:.2f})"
        ours, theirs = _in_units(row["rgd_seconds"]), _in_units(row["cross_entropy_seconds"])
        lines.append(f"  {size:>14}  {ours:>10}  {theirs:>16}  {ratio:<18}  {row['pairs']}")
    return lines


def _in_units(seconds: float) -> str:
    return f"{1e6 * seconds:.0f} us" if seconds < 1e-3 else f"{1e3 * seconds:.1f} ms"
