"""Two ``torchrun`` agents: tables in tiers, sharded over nodes, train bit for bit like stock FUSED ones."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from torchrun import Ended, Node, local_nodes, run

PROGRAM = Path(__file__).with_name("two_nodes.py")


def assert_equal_on_all_ranks(job: Ended) -> None:
    assert job.codes == [0, 0], job
    assert sorted(line.split(":")[0] for out in job.output for line in out.splitlines() if "equal" in line) == [
        f"rank {r}, local rank {r % 2}" for r in range(4)
    ], job


def volumes(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_nodes_that_share_a_path_train_like_fused_ones_and_each_rank_has_a_volume_of_its_own(tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    assert_equal_on_all_ranks(run(local_nodes(tmp_path, 2), 2, PROGRAM, shared))
    assert volumes(shared) == ["rank_0", "rank_1", "rank_2", "rank_3"]


@pytest.fixture
def namespaces(tmp_path) -> Iterator[list[Node]]:
    """Two network namespaces that a pair of virtual devices connects, and nothing else."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the command ip (iproute2)")
    names = [f"mtrains-{os.getpid()}-{i}" for i in range(2)]
    nodes = [
        Node(tmp_path / f"node{i}", ("ip", "netns", "exec", name), f"10.77.0.{i + 1}", (("GLOO_SOCKET_IFNAME", "veth0"),))
        for i, name in enumerate(names)
    ]
    made = []
    try:
        for name in names:
            _ip("netns", "add", name)
            made.append(name)
        _ip("-n", names[0], "link", "add", "veth0", "type", "veth", "peer", "name", "veth0", "netns", names[1])
        for name, node in zip(names, nodes, strict=True):
            node.folder.mkdir()
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "addr", "add", f"{node.address}/24", "dev", "veth0")
            _ip("-n", name, "link", "set", "veth0", "up")
        yield nodes
    finally:
        for name in made:
            _ip("netns", "del", name)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=30)
    if done.returncode:
        pytest.skip(f"no network namespaces here: ip {' '.join(arguments)}: {done.stderr.strip()}")


def test_nodes_in_two_network_namespaces_train_like_fused_ones_on_paths_of_their_own(namespaces):
    for node in namespaces:
        (node.folder / "nvme0").mkdir()
    assert_equal_on_all_ranks(run(namespaces, 2, PROGRAM, "nvme0", port=29500))
    assert sorted(volumes(node.folder / "nvme0") for node in namespaces) == [["rank_0", "rank_1"], ["rank_2", "rank_3"]]
