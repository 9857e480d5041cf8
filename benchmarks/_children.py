"""Work in a fresh process: its memory is its own, and it may be killed."""

from __future__ import annotations

import multiprocessing
import signal
import sys
from collections.abc import Callable
from typing import Any


def in_child(run: Callable[..., Any], *arguments: Any, killed: bool = False) -> Any:
    """What ``run`` returns in a process of its own; None when it is to kill itself, and did.

    Raises: SystemExit when the child ends otherwise.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_send, args=(there, run, arguments))
    child.start()
    there.close()
    try:
        result = here.recv()
    except EOFError:
        result = None
    child.join()
    if child.exitcode != (-signal.SIGKILL if killed else 0):
        sys.exit(f"{run.__name__} ended with {child.exitcode}")
    return result


def _send(there: Any, run: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    there.send(run(*arguments))
