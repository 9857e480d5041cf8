"""Profiles in files: one JSON object with its fields under their names, and ``format_version``, written whole or not at all.

A file is refused, as a ``ConfigurationError`` that names the kind of profile and the command that makes one, when it cannot be read, is no
JSON object, has no version or a newer one than this release reads, or lacks fields.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..errors import ConfigurationError

Profile = TypeVar("Profile")


@dataclass(frozen=True)
class ProfileFormat:
    """What a file holds ("hardware profile"), the newest version that is read, which is written, and the command that makes one."""

    kind: str
    version: int
    made_with: str

    def save(self, path: str | Path, content: dict[str, Any]) -> None:
        """Writes ``content`` and the version.

        Raises: ConfigurationError when the file cannot be written; what was there is untouched then.
        """
        path = Path(path)
        new = path.with_name(f"{path.name}.{os.getpid()}.new")
        try:
            try:
                text = json.dumps({"format_version": self.version} | content, indent=1, ensure_ascii=False)
                new.write_text(text + "\n", encoding="utf-8")
                new.replace(path)
            finally:
                new.unlink(missing_ok=True)
        except OSError as e:
            raise ConfigurationError(f"{self.kind} '{path}': cannot be written: {e.strerror}; name another file") from e

    def load(self, path: str | Path, read: Callable[[dict[str, Any]], Profile]) -> Profile:
        """What ``read`` makes of the file's fields, the version left out.

        Raises: ConfigurationError; also those of ``read``.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as e:
            raise self._refused(path, f"cannot be read: {e}; make one with `{self.made_with}`") from e
        version = content.pop("format_version", None) if isinstance(content, dict) else None
        if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version <= self.version:
            what = f"format_version must be 1 to {self.version}, got {version!r}"
            raise self._refused(path, f"{what}; update this package, or make it again with `{self.made_with}`")
        try:
            return read(content)
        except ConfigurationError as e:  # of a field that cannot be; one is a ValueError too
            raise self._refused(path, str(e)) from e
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            what = f"lacks fields of format {self.version} or has others: {e!r}"
            raise self._refused(path, f"{what}; make it again with `{self.made_with}`") from e

    def _refused(self, path: str | Path, what: str) -> ConfigurationError:
        return ConfigurationError(f"{self.kind} '{path}': {what}")
