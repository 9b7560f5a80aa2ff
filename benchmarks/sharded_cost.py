"""What a power step sends and computes for a transformer of 8 billion parameters.

Nothing of that size is allocated: the step for the seven matrices of one block (width
4096, feed-forward 14336, 8 key-value heads of 128) is compiled for 64 devices from
shapes alone. The collectives are read off the compiled program and XLA's own cost
analysis counts operations and bytes; 32 blocks and the embedding tables of 128,256
tokens are multiples of that. The sums for small weights are compared with those of the
same program with weights a quarter as wide, which must scale as the model says.

    python benchmarks/sharded_cost.py [--json FILE] [--devices 64]
"""

import argparse
import json
import math
import os
import re
from typing import Any


_BLOCKS = 32
_BLOCK = ((4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096))
_BLOCK += ((14336, 4096), (14336, 4096), (4096, 14336))
_TABLES = ((128256, 4096), (128256, 4096))
_BYTES = {"f32": 4, "bf16": 2, "pred": 1, "s32": 4, "f64": 8}


def _program(shapes: Any, layout: str, devices: int) -> Any:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    import spectrax

    mesh = Mesh(np.array(jax.devices()[:devices]), ("devices",))

    def abstract(index: int, shape: tuple[int, int]) -> jax.ShapeDtypeStruct:
        # Tensor parallel: the last matrix of a block, and the output projection of the
        # attention, are laid out along their inputs.
        along_inputs = layout == "tensor" and index in (3, 6)
        spec = (None, "devices") if along_inputs else ("devices", None)
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)

    weights = [abstract(i, shape) for i, shape in enumerate(shapes)]
    states = [
        jax.eval_shape(lambda w: spectrax.init_power_state(w, num_steps=0), w)
        for w in weights
    ]

    @jax.jit
    def step(weights: Any, states: Any) -> Any:
        return [
            spectrax.power_iterate(w, s) for w, s in zip(weights, states, strict=True)
        ]

    return step.lower(weights, states).compile()


def _cost(shapes: Any, layout: str, devices: int) -> dict[str, Any]:
    compiled = _program(shapes, layout, devices)
    kinds = "all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute"
    calls: dict[str, int] = {}
    sent = 0.0
    largest = 0
    for line in compiled.as_text().splitlines():
        match = re.search(rf"= (.*?) ({kinds})(-start)?\(", line)
        if not match:
            continue
        kind = match.group(2)
        calls[kind] = calls.get(kind, 0) + 1
        for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", match.group(1)):
            size = math.prod(map(int, sizes.split(","))) if sizes else 1
            largest = max(largest, size)
            # On a ring every device sends this part of the result.
            share = (devices - 1) / devices * (2 if kind == "all-reduce" else 1)
            sent += share * size * _BYTES[dtype]
    analysis = compiled.cost_analysis()
    return {
        "collectives": calls,
        "bytes sent per device": sent,
        "largest message": largest,
        "operations per device": analysis["flops"],
    }


def main() -> None:
    """Prints a table, and writes it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="also write the results to this file")
    parser.add_argument("--devices", type=int, default=64)
    args = parser.parse_args()
    os.environ["XLA_FLAGS"] = (
        f"--xla_force_host_platform_device_count={args.devices} "
        + os.environ.get("XLA_FLAGS", "")
    )
    results = {}
    for layout in ("fsdp", "tensor"):
        block = _cost(_BLOCK, layout, args.devices)
        quarter = _cost([(m // 4, n // 4) for m, n in _BLOCK], layout, args.devices)
        tables = _cost(_TABLES, layout, args.devices)
        sent, operations = (
            _BLOCKS * block[key] + tables[key]
            for key in ("bytes sent per device", "operations per device")
        )
        results[layout] = {
            "block": block,
            "block a quarter as wide": quarter,
            "tables": tables,
            "model": {"bytes sent per device": sent, "operations": operations},
        }
        parameters = _BLOCKS * sum(m * n for m, n in _BLOCK)
        parameters += sum(m * n for m, n in _TABLES)
        ratio = block["bytes sent per device"] / quarter["bytes sent per device"]
        billions = parameters / 1e9
        print(f"{layout}: {billions:.2f}e9 parameters on {args.devices} devices")
        print(f"  one block: {block['collectives']}")
        print(f"  largest message: {block['largest message']} numbers")
        print(f"  sent per device and step: {sent / 1e6:.1f} MB in all")
        print(f"  operations per device and step: {operations / 1e9:.2f}e9")
        print(f"  bytes, over those of a block a quarter as wide: {ratio:.2f}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
