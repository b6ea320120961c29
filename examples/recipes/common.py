"""Shared code of the recipes: options with defaults, the precision of a device, atomic writing of files."""

from __future__ import annotations

import argparse
import pathlib
from typing import Any

import torch


class Parser(argparse.ArgumentParser):
    """A parser whose `add` shows the default of an option, if it has one."""

    def add(self, name: str, *, help: str, **settings: Any) -> None:
        """Adds an option."""
        shown = settings.get("default") not in (None, ())
        self.add_argument(name, help=f"{help} (default: %(default)s)" if shown else help, **settings)


def found_precision(device: torch.device) -> str:
    """bfloat16 if there is a GPU that computes in it."""
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if fast else "float32"


def write(content: dict[str, Any], path: pathlib.Path) -> None:
    """Saves a file; if the program is stopped meanwhile, the older file remains."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(content, temporary)
    temporary.replace(path)
