"""One rank's failure ends them all, with the reason.

Gloo tells a rank that a connection is gone, never why, and a rank that waits for another one of its group is told nothing. The
reason goes through the process group's store, beside its collectives. Every rank has a thread that looks there, under:

    failure        the first failure, in words; whoever comes first sets it
    seen/<rank>    this rank knows of it
    roll_call      a rank lost a connection, and asks who is there
    here/<rank>    this rank is
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from .errors import ConfigurationError, RankFailedError

POLL_SECONDS = 0.25
ANSWER_SECONDS = 5.0  # guess: a rank that is alive answers within a poll or two
STUCK_SECONDS = 20.0  # below the 30 seconds after which torchrun kills

_entered = 0  # how often on this rank: each use has keys of its own


@contextmanager
def fail_together() -> Iterator[None]:
    """Around everything that trains, on every rank: what ends one rank ends all of them.

    A rank that raises first tells the others, then raises on. The others raise RankFailedError, which names the rank and its
    error; so they do when a rank is gone without a word (SIGKILL, a node that went down), by the connections that this breaks.
    A rank that stays stuck all the same is ended after 20 seconds. SIGTERM, which torchrun sends to the other ranks of a node, becomes an
    exception too, so that volumes are closed and the reason is told.

    Raises: ConfigurationError outside of a process group; RankFailedError.
    """
    if not dist.is_initialized():
        raise ConfigurationError("fail_together() needs a process group: call torch.distributed.init_process_group first")
    if dist.get_world_size() == 1:
        yield
        return
    global _entered
    _entered += 1
    # A client of its own: the thread must not wait for a request of the collectives.
    client = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
    store = dist.PrefixStore(f"mtrains/fail_together/{_entered}", client)
    ranks = _Ranks(store, dist.get_rank(), dist.get_world_size())
    with _sigterm_raises(ranks):
        try:
            yield
        except SystemExit as e:
            if e.code in (None, 0):
                raise
            ranks.end_with(e)
        except BaseException as e:
            ranks.end_with(e)
        finally:
            ranks.leave()


class _ToldToStopError(BaseException):
    """SIGTERM. No Exception, so that no handler of one takes it for an error of its own."""

    def __str__(self) -> str:
        return "told to stop (SIGTERM)"


@contextmanager
def _sigterm_raises(ranks: _Ranks) -> Iterator[None]:
    """Where SIGTERM is nobody else's. One that comes when this rank is about to end is swallowed, once: it would cut off the reason."""
    mine = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if mine:
        signal.signal(signal.SIGTERM, lambda *_: ranks.told_to_stop())
    try:
        yield
    finally:
        if mine:
            failed = ranks.leaving.is_set() and not ranks.told.is_set()
            signal.signal(signal.SIGTERM, _swallow_once if failed else signal.SIG_DFL)


def _swallow_once(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class _Ranks:
    """What this rank knows of the others, and tells them."""

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self.store, self.rank, self.size = store, rank, size
        self.name = f"rank {rank} (process {os.getpid()} on {socket.gethostname()})"
        self.failure: str | None = None
        self.leaving = threading.Event()  # the main thread knows
        self.told = threading.Event()
        self.left = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="mtrains-fail-together", daemon=True)
        self.thread.start()

    def leave(self) -> None:
        """The thread ends."""
        self.left.set()
        self.thread.join(ANSWER_SECONDS)

    def told_to_stop(self) -> None:
        """The handler of SIGTERM: raises, unless this rank is on its way out already."""
        first = not self.told.is_set()
        self.told.set()
        if first and not self.leaving.is_set():
            raise _ToldToStopError

    def _watch(self) -> None:
        seen = answered = False
        stuck_at = float("inf")
        try:
            while not self.left.wait(POLL_SECONDS):
                if not seen and self.store.check(["failure"]):
                    self.failure = self.store.get("failure").decode()
                    self.store.set(f"seen/{self.rank}", "")
                    seen = True
                if not answered and self.store.check(["roll_call"]):
                    self.store.set(f"here/{self.rank}", "")
                    answered = True
                if self.leaving.is_set():
                    stuck_at = float("inf")
                elif self.failure is not None or self.told.is_set():
                    stuck_at = min(stuck_at, time.monotonic() + STUCK_SECONDS)
                if time.monotonic() > stuck_at:
                    self._end_stuck()
        except dist.DistError:
            pass  # the store went with its node: connections break as well, and no one is there to ask

    def _end_stuck(self) -> None:
        why = RankFailedError(_because(self.failure)) if self.failure is not None else _ToldToStopError()
        print(f"{self.name} does not end by itself and is ended: {why}", file=sys.stderr, flush=True)
        os._exit(1)

    def end_with(self, error: BaseException) -> NoReturn:
        """Raises what this rank ends with: its own error, which it tells the others, or that another one failed."""
        self.leaving.set()
        try:
            mine, missing = self._text(error), set[int]()
            if not _lost_connection(error) and not isinstance(error, _ToldToStopError):
                self._tell(mine)
            else:
                missing = self._roll_call()
                if missing and self.failure is None:
                    lost = ", ".join(map(str, sorted(missing)))
                    mine = (
                        f"rank {lost} did not answer for {ANSWER_SECONDS:g} s: killed, cut off, or finished before the others "
                        f"(noticed by {self.name})"
                    )
                self._tell(mine)
            if self.failure == mine:
                self._wait_until(lambda: self._without("seen") <= missing)
        except dist.DistError:
            self.failure = self.failure or f"the process group's store is gone, as is its node ({self._text(error)})"
        final = self._final(error)
        final.__cause__ = error.__cause__ if final is error else error
        try:
            raise final
        except BaseException as e:
            if "TORCHELASTIC_ERROR_FILE" in os.environ:
                get_error_handler().record_exception(e)  # what torchrun shows at its end
            raise

    def _final(self, error: BaseException) -> BaseException:
        """What this rank ends with, the first failure being known."""
        assert self.failure is not None
        told = isinstance(error, _ToldToStopError)
        if self.failure == self._text(error):
            return SystemExit(128 + signal.SIGTERM) if told else error
        return RankFailedError(_because(self.failure)) if told or _lost_connection(error) else error

    def _text(self, error: BaseException) -> str:
        return f"{self.name} failed: {_kind(error)}{error}"

    def _tell(self, failure: str) -> None:
        if self.failure is None:
            self.failure = self.store.compare_set("failure", "", failure).decode()

    def _roll_call(self) -> set[int]:
        """The ranks that do not answer; none as soon as a failure is known."""
        self.store.set("roll_call", "")
        missing: set[int] = set()

        def settled() -> bool:
            nonlocal missing
            missing = self._without("here")
            return self.failure is not None or not missing

        self._wait_until(settled)
        return missing

    def _without(self, key: str) -> set[int]:
        return {r for r in range(self.size) if not self.store.check([f"{key}/{r}"])}

    def _wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + ANSWER_SECONDS
        while not condition() and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)


def _kind(error: BaseException) -> str:
    return "" if isinstance(error, _ToldToStopError) else f"{type(error).__name__}: "


def _because(failure: str) -> str:
    return f"{failure}. This rank cannot go on without it; look there for the cause"


def _lost_connection(error: BaseException | None) -> bool:
    """Whether gloo or the store raised it, somewhere down its chain: what a rank sees of another one's end."""
    while error is not None:
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False
