"""The report of a proof: Markdown that goes into a README as it is, and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from shortzip.scripts.proofs.section import Result, Table

TROUBLE_LINES = 40  # of a section's tracebacks, the last ones


def as_json(results: Sequence[Result], about: Mapping[str, Any]) -> str:
    return json.dumps({**about, "sections": [asdict(result) for result in results]}, indent=1, default=str) + "\n"


def as_markdown(results: Sequence[Result], about: Mapping[str, Any]) -> str:
    """A heading, a table of the sections, and what each has found."""
    failed = [result.name for result in results if result.outcome == "failed"]
    skipped = [result.name for result in results if result.outcome == "skipped"]
    parts = [
        "## Proven on a device",
        f"`{about['command']}` ({about['commit']}, {about['date']}): "
        + (f"{len(failed)} of {len(results)} sections failed ({', '.join(failed)})" if failed else "nothing failed")
        + (f"; skipped: {', '.join(skipped)}" if skipped else "")
        + ".",
        _table(
            ["section", "outcome", "checks", "seconds"],
            [
                [
                    f"{result.name}: {result.title}",
                    result.outcome + (f" ({_cell(result.reason)})" if result.reason else ""),
                    f"{sum(check.holds for check in result.checks)} of {len(result.checks)}",
                    f"{result.seconds:.0f}",
                ]
                for result in results
            ],
        ),
        *[part for result in results for part in _section(result)],
    ]
    return "\n\n".join(parts) + "\n"


def _section(result: Result) -> list[str]:
    bad = [check for check in result.checks if not check.holds]
    if not (result.tables or bad or result.trouble):
        return []
    parts = [f"### {result.name}: {result.title}"]
    if bad:
        parts.append("\n".join(f"- **does not hold**: {check.name}: {_cell(check.detail)}" for check in bad))
    for table in result.tables:
        parts += [f"{table.title}:", _table_of(table)]
    if result.trouble:
        lines = result.trouble.rstrip().splitlines()[-TROUBLE_LINES:]
        parts.append("```\n" + "\n".join(lines) + "\n```")
    return parts


def _table_of(table: Table) -> str:
    return _table(table.headings, table.rows)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(text: str) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ").strip()
