"""Writes what pytest reported (``--junitxml``) into the tables of docs/torchrec.md, between their markers.

python tests/torchrec_tables.py harness build/torchrec-harness.xml
python tests/torchrec_tables.py versions build/torchrec-1.6.1.xml build/torchrec-1.8.0.xml
"""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

DOCUMENT = Path(__file__).parent.parent / "docs" / "torchrec.md"
CASE = re.compile(r"\[(?:(?P<world>\dx\d)-)?(?P<collection>EBC|EC) (?P<sharding>\w+): (?P<variant>[^\]]*?)(?:-(?P<world_behind>\dx\d))?\]")


def outcomes(report: Path) -> Iterator[tuple[str, str, str, str]]:
    """Class, test, outcome, and why it was skipped."""
    for case in ElementTree.parse(report).iter("testcase"):
        skipped = case.find("skipped")
        failed = case.find("failure") is not None or case.find("error") is not None
        outcome = "FAILED" if failed else "skipped" if skipped is not None else "passed"
        yield case.get("classname", ""), case.get("name", ""), outcome, "" if skipped is None else skipped.get("message", "")


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """In Markdown."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def of_cases(report: Path) -> str:
    """Collection by collection: which worlds (nodes x ranks) pass, by variant and sharding type."""
    cells: dict[str, dict[str, dict[str, list[str]]]] = {}
    for _, test, outcome, _ in outcomes(report):
        if found := CASE.search(test):
            cell = cells.setdefault(found["collection"], {}).setdefault(found["variant"], {}).setdefault(found["sharding"], [])
            world = found["world"] or found["world_behind"] or "stock fails too"
            cell.append(world if outcome == "passed" else f"{world} {outcome}")
    tables = []
    for collection, variants in cells.items():
        shardings = list(dict.fromkeys(s for v in variants.values() for s in v))
        rows = [[v, *(", ".join(sorted(of.get(s, ["–"]))) for s in shardings)] for v, of in variants.items()]
        tables.append(table([collection, *(f"`{s}`" for s in shardings)], rows))
    return "\n\n".join(tables)


def of_test_cases(report: Path) -> str:
    """TorchRec's unittest classes."""
    rows = []
    for place, test, outcome, why in outcomes(report):
        if test_case := re.search(r"\.TorchRec(\w+)$", place):
            rows.append([f"{test_case[1]}", f"`{test}`", outcome if not why else f"{outcome}: {why}"])
    return table(["test case", "test", "outcome"], rows)


def of_versions(reports: list[Path]) -> str:
    """By test file and version: how many tests passed, were skipped, failed."""
    versions = [report.stem.removeprefix("torchrec-") for report in reports]
    counts: dict[str, dict[str, Counter[str]]] = {}
    for version, report in zip(versions, reports, strict=True):
        for place, _, outcome, _ in outcomes(report):
            file = ".".join(place.split(".")[:2]).replace(".", "/") + ".py"
            counts.setdefault(file, {}).setdefault(version, Counter())[outcome] += 1
    rows = [
        [
            f"`{file}`",
            *(", ".join(f"{n} {outcome}" for outcome, n in sorted(of.get(v, Counter()).items(), reverse=True)) or "–" for v in versions),
        ]
        for file, of in sorted(counts.items())
    ]
    return table(["tests", *(f"torchrec {v}" for v in versions)], rows)


def replace(name: str, text: str) -> None:
    """Puts ``text`` between the markers of ``name``."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, rest = DOCUMENT.read_text().split(begin)
    DOCUMENT.write_text(f"{before}{begin}\n\n{text}\n\n{end}{rest.split(end)[1]}")


def main(what: str, *reports: str) -> None:
    """See above."""
    if what == "harness":
        replace("cases", of_cases(Path(reports[0])))
        replace("test cases", of_test_cases(Path(reports[0])))
    else:
        replace("versions", of_versions([Path(r) for r in reports]))


if __name__ == "__main__":
    main(*sys.argv[1:])
