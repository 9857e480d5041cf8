"""The README's program runs as printed, and what it and the docs name exists: links, commands, public names."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click

import torchrec_mtrains as mtrains
from torchrec_mtrains.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {page.name: page.read_text() for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md")))}


def test_the_program_runs_as_printed(tmp_path):
    (program,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "program.py").write_text(program)
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, "program.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows, pool_rows, misses = (int(n.replace(",", "")) for n in re.findall(r"([\d,]+) (?:rows|in the pool|misses)", done.stdout))
    assert pool_rows < rows == 2_000_000
    assert misses > 0
    assert (tmp_path / "checkpoint" / "LATEST").read_text() == "step_000000000100\n"


def test_every_link_leads_to_a_file():
    for page in [ROOT / "README.md", *ROOT.glob("docs/*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_readme_links_to_every_page():
    for page in ROOT.glob("docs/*.md"):
        assert f"](docs/{page.name})" in README


def test_every_make_target_in_the_docs_exists():
    makefile = (ROOT / "Makefile").read_text()
    named = {target for text in PAGES.values() for target in re.findall(r"(?:^|`|    )make ([a-z]+(?:-[a-z]+)*)", text, re.MULTILINE)}
    assert {"demo", "test", "torchrec-versions"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def parsed(command: click.Command, arguments: list[str], parent: click.Context | None = None) -> click.Context:
    """The innermost command's context. Raises: click's exceptions."""
    context = command.make_context(command.name, arguments, parent)
    if not isinstance(command, click.Group):
        return context
    _, inner, rest = command.resolve_command(context, [*context._protected_args, *context.args])
    assert inner is not None
    return parsed(inner, rest, context)


def test_every_command_line_in_the_docs_has_options_that_exist():
    lines = [line for text in PAGES.values() for line in text.replace("\\\n", " ").splitlines()]
    commands = [found[1] for line in lines if (found := re.match(r"(?:    |torchrun .*--no-python )?mtrains ([a-z].*?)(?:$|  #)", line))]
    assert len(commands) >= 10
    for command in commands:
        assert parsed(main, shlex.split(command)).command.callback is not None, command


def test_every_public_name_in_the_docs_exists():
    names = {name for text in PAGES.values() for name in re.findall(r"\bmtrains\.([A-Za-z_][\w.]*\w)", text)}
    assert {"register", "planner.TieredShardingPlanner", "save_checkpoint"} <= names
    for name in names:
        found = mtrains
        for part in name.split("."):
            assert hasattr(found, part), f"mtrains.{name}"
            found = getattr(found, part)
