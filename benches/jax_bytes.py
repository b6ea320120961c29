"""The bytes that a compiled step in JAX reads and writes, by XLA's count, over the bytes of its logits.

    python benches/jax_bytes.py                 # compiled for the CPU
    python benches/jax_bytes.py --json FILE     # and written

With the packages jax-cuda12-plugin and jax-cuda12-pjrt of JAX's version, and nvidia-cuda-nvcc-cu12, XLA
compiles for an H100 too. No GPU is needed for that.

XLA adds up the reads and writes of each kernel (`compiled.cost_analysis()`, "bytes accessed"). Losses need
one read of the logits. A training step needs one more read and a write, unless a row is kept on the chip
between them.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import rgd.jax

ROWS, CLASSES = 1024, 8192
FLOOR = {"losses": 1, "training": 3}
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84978434048
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 3 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
"""What XLA reads of a GPU that is not there, in its own format (`GpuTargetConfigProto`)."""


def by_formula(logits, labels, **options):
    """The loss in `jax.numpy`."""
    return rgd.jax.cross_entropy(logits, labels, backend="jnp", **options)


def smoothed(logits, labels):
    return by_formula(logits, labels, label_smoothing=0.1)


def over_the_batch(logits, labels):
    return by_formula(logits, labels, weighting=rgd.KLBall(0.1))


def plain(logits, labels):
    """A mean without weights, as users write it."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.mean(jnp.take_along_axis(log_p, labels[:, None], axis=-1))


LOSSES = {
    "rgd.jax.cross_entropy": by_formula,
    "the same with label smoothing": smoothed,
    "the same with KLBall": over_the_batch,
    "the mean of jax.nn.log_softmax": plain,
}


def compiled(step, dtype, sharding=None):
    """A step on logits of a dtype, compiled for the device of a sharding, or for the CPU."""
    shapes = ((ROWS, CLASSES), dtype), ((ROWS,), jnp.int32)
    given = (jax.ShapeDtypeStruct(shape, kind, sharding=sharding) for shape, kind in shapes)
    return jax.jit(step).lower(*given).compile()


def accessed(program):
    """The bytes that a program accesses, as XLA counts them."""
    found = program.cost_analysis()
    if found is None:  # a program for an absent device has no count of its own, so XLA counts its text
        from jax._src.lib import _jax  # noqa: PLC0415

        (module,) = program.runtime_executable().hlo_modules()
        found = _jax.hlo_module_cost_analysis(jax.devices("cpu")[0].client, module)
    return found["bytes accessed"]


def figures(sharding=None):
    """The bytes of each loss, by dtype and step, over those of the logits."""
    return {
        name: {
            f"{jnp.dtype(dtype).name}, {kind}": accessed(compiled(step, dtype, sharding))
            / (ROWS * CLASSES * jnp.dtype(dtype).itemsize)
            for dtype in (jnp.float32, jnp.bfloat16)
            for kind, step in (("losses", loss), ("training", jax.value_and_grad(loss)))
        }
        for name, loss in LOSSES.items()
    }


def h100():
    """The sharding for compiling for an H100, without having one; None without the packages for this."""
    folder = importlib.util.find_spec("nvidia.cuda_nvcc") if importlib.util.find_spec("nvidia") else None
    if importlib.util.find_spec("jax_cuda12_plugin") is None or folder is None:
        return None
    (path,) = list(folder.submodule_search_locations)[:1]
    os.environ["XLA_FLAGS"] = f"--xla_gpu_cuda_data_dir={path} --xla_gpu_autotune_level=0"
    from jax.experimental import topologies  # noqa: PLC0415

    topology = topologies.get_topology_desc("", "cuda", target_config=H100, topology="1x1x1")
    return jax.sharding.SingleDeviceSharding(topology.devices[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--json", type=pathlib.Path, help="write the figures to this file")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    gpu = h100()
    found = {"CPU": figures()} | ({} if gpu is None else {"H100": figures(gpu)})
    print(f"Bytes accessed over those of the logits, ({ROWS}, {CLASSES}); at least {FLOOR}")
    for device, by_loss in found.items():
        columns = next(iter(by_loss.values()))
        print(f"\n{device:34}" + "".join(f"{column:>20}" for column in columns))
        for name, row in by_loss.items():
            print(f"{name:34}" + "".join(f"{value:20.1f}" for value in row.values()))
    if options.json is not None:
        versions = {"jax": importlib.metadata.version("jax")}
        options.json.write_text(json.dumps({"versions": versions, "figures": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
