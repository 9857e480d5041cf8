"""What every command of the CLI shares: how a typed error reaches the user, and that results have a place before work begins."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from .errors import ConfigurationError, MTrainsError


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


def require_writable(option: str, path: str | None, *, folder: bool = False) -> None:
    """Makes the folder that a file is in, or that ``path`` is, and tries it: whoever has worked for hours must not learn it at the end.

    Raises: ConfigurationError when it cannot be made or written. Nothing is tried for None.
    """
    if path is None:
        return
    place = Path(path) if folder else Path(path).parent
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as e:
        raise ConfigurationError(f"{option} {path}: {e.strerror}; name a {'folder' if folder else 'file'} that can be written") from e
