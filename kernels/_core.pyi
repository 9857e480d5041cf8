"""The native core, for type checkers: its names are checked where they are used, by the tests."""

from typing import Any

def __getattr__(name: str) -> Any: ...
