"""Runs checks that need several devices of JAX in one process, and reports the outcome of each."""

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
    """The outcome of each function in the program's `CHECKS`: "equal", or the traceback of its error."""
    # Do not pass on the flags of this process, which compiles in another way than users do.
    flags = "--xla_force_host_platform_device_count=4"
    # The checks look at numbers and at transfers between devices, so fast compilation is enough.
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
