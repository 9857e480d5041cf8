"""One HTML file with its pictures inside: what every report is made of."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .errors import ConfigurationError

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 960px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0; font-size: 13px } th, td { padding: .25em .7em; border-bottom: 1px solid #ddd }
th { text-align: left; border-bottom: 2px solid #888 } td.n { text-align: right; font-variant-numeric: tabular-nums }
img { width: 100% } h2 { margin-top: 2em }
"""


def png(figure: Any) -> str:
    """A matplotlib figure as a PNG file in base64."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight")
    return base64.b64encode(buffer.getvalue()).decode()


def _cell(value: Any) -> str:
    text = f"{value:,}" if isinstance(value, int) else str(value)
    number = re.fullmatch(r"[\d,.]+( [KMGT]?i?B)?", text)
    return f'<td class="n">{text}</td>' if number else f"<td>{html.escape(text)}</td>"


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Numbers and byte counts to the right, all else to the left."""
    head = "".join(f"<th>{html.escape(h)}</th>" for h in heads)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def picture(title: str, data: str) -> str:
    """What ``png`` made, under its title."""
    return f'<h2>{html.escape(title)}</h2><img alt="{html.escape(title)}" src="data:image/png;base64,{data}">'


def document(title: str, parts: Iterable[str]) -> str:
    """The whole file, from parts that are HTML already."""
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def write(content: str, path: Path) -> Path:
    """The file, its folder made if there is none.

    Raises: ConfigurationError when it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    except OSError as e:
        raise ConfigurationError(f"report {path}: {e.strerror}; name another file with --report") from e
    return path
