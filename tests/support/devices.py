"""Checks that need several devices of JAX: they run in one process, and each has its outcome."""

import json
import os
import subprocess
import sys

RUN_ALL = """
import json, traceback
OUTCOMES = {}
for name, check in CHECKS.items():
    try:
        check()
        OUTCOMES[name] = "equal"
    except Exception:
        OUTCOMES[name] = traceback.format_exc()
print(json.dumps(OUTCOMES))
"""


def outcomes_on_four_devices(program):
    """Of each of the program's `CHECKS`, functions by name: "equal", or the traceback of its error."""
    # Not those of this process, which compiles in another way than users do.
    flags = "--xla_force_host_platform_device_count=4"
    # What is asked is which numbers come out, and what moves between devices: compiled in a hurry.
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", program + RUN_ALL],
        env={**os.environ, **quick, "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])
