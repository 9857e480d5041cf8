"""What every command of the CLI shares: how a typed error reaches the user."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import click

from .errors import MTrainsError


class Failed(click.ClickException):
    """One clear message on stderr, and exit code 2, as for a wrong option."""

    exit_code = 2


def typed_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    """Turns the typed errors of this package and of TorchRec's planner into ``Failed``."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        from torchrec.distributed.planner.types import PlannerError

        try:
            return command(*args, **kwargs)
        except (MTrainsError, PlannerError) as e:
            raise Failed(str(e)) from e

    return run
