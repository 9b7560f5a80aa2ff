"""Weights laid out over devices: nothing gathers them, and nothing else changes."""

import json
import os
import pathlib
import socket
import subprocess
import sys
from typing import Any

import pytest


OPTIMIZED = True  # see conftest.py
_PROGRAM = pathlib.Path(__file__).with_name("sharding.py")
_DENSE, _CONVOLUTION = 2 * 64 * 64, 3 * 16 * 16


def _start(*arguments: str, devices: int = 1) -> subprocess.Popen:
    environment = dict(os.environ)
    environment["JAX_ENABLE_X64"] = "1"
    environment["XLA_FLAGS"] = (
        f"--xla_force_host_platform_device_count={devices} "
        "--xla_backend_optimization_level=0"  # compiles faster; the same collectives
    )
    return subprocess.Popen(
        [sys.executable, str(_PROGRAM), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _result(process: subprocess.Popen) -> dict[str, Any]:
    try:
        output, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, errors[-3000:]
    return json.loads(output.splitlines()[-1])


def _gathered(sent: list[tuple[str, int]]) -> list[int]:
    """The sizes of whole weights that were moved other than to be summed."""
    moved = [size for kind, size in sent if kind != "all-reduce"]
    return sorted(size for size in moved if size in (_DENSE, _CONVOLUTION))


def _check_equal(got: dict[str, Any], expected: dict[str, Any]) -> None:
    assert got["losses"] == pytest.approx(expected["losses"], rel=1e-6)
    assert got["norms"] == pytest.approx(expected["norms"], rel=1e-4)


def test_layouts_and_processes():
    """One test, as each worker of a parallel run would start the programs again."""
    results = _result(_start("devices", devices=8))
    assert results["replicated"]["advance"] == []
    for layout in ("fsdp", "tensor"):
        _check_equal(results[layout], results["one device"])
        sent = results[layout]["advance"]
        assert {kind for kind, _ in sent} == {"all-reduce"}
        # The all-reduces are of Gram matrices and of blocks of 8 or 24 vectors.
        assert max(size for _, size in sent) < _DENSE // 2
    step, plain = results["fsdp"]["step"], results["fsdp"]["plain step"]
    assert _gathered(step) == _gathered(plain)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = [_start("process", address, "2", str(i)) for i in range(2)]
    first, second = [_result(process) for process in processes]
    assert first == second
    _check_equal(first["fsdp"], results["one device"])
