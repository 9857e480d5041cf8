"""Jobs of ``torchrun`` agents, one a node: on this machine, or each in a network namespace of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

TORCHRUN = Path(sys.executable).with_name("torchrun")
HANG_S = 240  # guess: far above the longest job


@dataclass
class Node:
    """Where an agent runs: its working directory, what its command line begins with, and its address in the job's network."""

    folder: Path
    prefix: tuple[str, ...] = ()
    address: str = "localhost"
    environment: tuple[tuple[str, str], ...] = ()


@dataclass
class Ended:
    """A job that ended: the exit codes of its agents, and what each of its ranks wrote to stdout and to stderr."""

    codes: list[int]
    output: list[str]
    errors: list[str]

    def __str__(self) -> str:
        ranks = "\n".join(f"== a rank\n{out}\n{err}" for out, err in zip(self.output, self.errors, strict=True))
        return f"exit codes {self.codes}\n{ranks}"


def local_nodes(folder: Path, count: int) -> list[Node]:
    """Nodes on this machine, each with a folder of its own."""
    nodes = [Node(folder / f"node{i}") for i in range(count)]
    for node in nodes:
        node.folder.mkdir()
    return nodes


def run(nodes: list[Node], ranks_per_node: int, *program: object, port: int | None = None) -> Ended:
    """Runs a program under one agent a node, to its end. A job that hangs fails the test."""
    endpoint = f"{nodes[0].address}:{port or _free_port()}"
    agents = []
    for i, node in enumerate(nodes):
        logs = node.folder / "logs"
        command = [*node.prefix, str(TORCHRUN), f"--nnodes={len(nodes)}", f"--nproc-per-node={ranks_per_node}", "--rdzv-id=job"]
        command += ["--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", f"--rdzv-conf=is_host={int(i == 0)}"]
        command += [f"--local-addr={node.address}", "--redirects=3", f"--log-dir={logs}", *map(str, program)]
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONSAFEPATH", "LOCAL_WORLD_SIZE")}
        environment |= {"OMP_NUM_THREADS": "1", **dict(node.environment)}
        log = (node.folder / "agent.log").open("w")
        agents.append(
            subprocess.Popen(command, cwd=node.folder, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        )
    try:
        codes = [agent.wait(HANG_S) for agent in agents]
    except subprocess.TimeoutExpired as e:
        said = [p for node in nodes for p in (node.folder / "agent.log", *sorted(node.folder.glob("logs/*/attempt_0/*/*.log")))]
        raise AssertionError(f"not over after {HANG_S} s:\n" + "\n".join(f"== {p}\n{p.read_text()}" for p in said)) from e
    finally:
        for agent in agents:
            if agent.poll() is None:
                agent.send_signal(signal.SIGTERM)  # an agent takes its ranks with it
                agent.wait(60)
    of_ranks = sorted(p for node in nodes for p in (node.folder / "logs").glob("*/attempt_0/*"))
    ended = Ended(codes, *([(p / f"{stream}.log").read_text() for p in of_ranks] for stream in ("stdout", "stderr")))
    if not of_ranks:
        ended.errors = [(node.folder / "agent.log").read_text() for node in nodes]
        ended.output = [""] * len(nodes)
    return ended


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return int(s.getsockname()[1])
