"""Compile every kernel for one target that is not there, and report as JSON lines.

    python -m tests.kernels.aot_worker v5e:2x2 | v6e:2x2 | h200

A process takes one target: the compilers cannot be loaded side by side.
"""

import importlib.resources
import json
import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
# Compilation touches no device, so two processes may load the library at once.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests.kernels import contract
from tests.kernels.cases import CASES, OPERATIONS

# Odd and tiny, then the size of the benchmark.
SHAPES = ((3, 5, 77), (64, 32, 4096))


def topology(target: str):
    if target != "h200":
        return topologies.get_topology_desc(platform="tpu", topology_name=target)
    text = importlib.resources.files("jaxkit_kernels").joinpath("aot/h200.txtpb").read_text()
    return topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=text, topology="1x1x1"
    )


def main(target: str) -> None:
    platform = "cuda" if target == "h200" else "tpu"
    marker = "mosaic_gpu" if platform == "cuda" else "tpu_custom_call"
    mesh = Mesh(np.array(topology(target).devices[:1]), ("x",))
    replicated = NamedSharding(mesh, PartitionSpec())
    work = []
    for case in CASES.values():
        for heads, modes, length in SHAPES:
            programs = contract.programs(case, "auto", length)
            # No [heads, modes, length] intermediate, whatever the direction.
            dense = 4 * heads * modes * length
            spec = contract.specs(case, heads, modes, replicated)
            work.append((case.name, programs, [heads, modes, length], spec, dense / 4))
    for operation in OPERATIONS.values():
        for shape in (operation.shapes[1], operation.large):
            spec = operation.specs(shape, sharding=replicated)
            limit = operation.dense(*shape) / 16
            work.append((operation.name, operation.programs("auto"), list(shape), spec, limit))
    for op, programs, shape, spec, limit in work:
        for name, program in programs.items():
            record = {"op": op, "program": name, "shape": shape, "limit": limit}
            try:
                with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                    traced = jax.jit(program).trace(*spec)
                    lowered = traced.lower(lowering_platforms=(platform,))
                compiled = lowered.compile()
                record["kernel"] = marker in lowered.as_text()
                record["temporary"] = compiled.memory_analysis().temp_size_in_bytes
            except Exception as error:  # reported by the test, with the others
                record["error"] = f"{type(error).__name__}: {error}"[:2000]
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
