"""Weights laid out over devices: nothing gathers them, and nothing else changes."""

import json
import os
import pathlib
import socket
import subprocess
import sys
from typing import Any

import pytest


_PROGRAM = pathlib.Path(__file__).with_name("sharding.py")
_DENSE, _CONVOLUTION = 2 * 64 * 64, 3 * 16 * 16


def _start(*arguments: str, devices: int = 1) -> subprocess.Popen:
    environment = dict(os.environ)
    environment["JAX_ENABLE_X64"] = "1"
    environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
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


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return _result(_start("devices", devices=8))


@pytest.mark.parametrize("layout", ["fsdp", "tensor"])
def test_results_are_those_of_one_device(results, layout):
    expected = results["one device"]
    assert results[layout]["losses"] == pytest.approx(expected["losses"], rel=1e-6)
    assert results[layout]["norms"] == pytest.approx(expected["norms"], rel=1e-4)


def test_replicated_weights_need_nothing(results):
    assert results["replicated"]["advance"] == []


@pytest.mark.parametrize("layout", ["fsdp", "tensor"])
def test_no_weight_is_gathered(results, layout):
    sent = results[layout]["advance"]
    assert {kind for kind, _ in sent} <= {"all-reduce", "all-gather"}
    # The all-reduces are of Gram matrices and of blocks of vectors, 8 or 24 of them.
    assert max(size for _, size in sent) < _DENSE // 2
    # The one all-gather is of the vectors of the convolution's five candidates.
    assert [size for kind, size in sent if kind == "all-gather"] == [5 * 8 * 16]


def test_a_step_gathers_no_more_weights_than_the_plain_one(results):
    def gathered(program: str) -> list[int]:
        moved = [n for kind, n in results["fsdp"][program] if kind != "all-reduce"]
        return sorted(n for n in moved if n in (_DENSE, _CONVOLUTION))

    assert gathered("step") == gathered("plain step")


def test_two_processes(results):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = [_start("process", address, "2", str(i)) for i in range(2)]
    first, second = [_result(process) for process in processes]
    assert first == second
    expected = results["one device"]
    assert first["fsdp"]["losses"] == pytest.approx(expected["losses"], rel=1e-6)
    assert first["fsdp"]["norms"] == pytest.approx(expected["norms"], rel=1e-4)
