"""What the READMEs say: links lead somewhere, and commands exist."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from shortzip.scripts.__main__ import VERBS
from shortzip.scripts.make_lmms_task import TaskConfig
from shortzip.train.settings.command_line import kinds_of
from shortzip.train.settings.flags import Flags

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("*/README.md"), *ROOT.glob("checkpoints/*/README.md")])
FOLDERS = ("reduction", "data", "train", "scripts", "configs")
SOURCES = sorted(path for folder in FOLDERS for end in ("py", "yaml") for path in (ROOT / folder).rglob(f"*.{end}"))
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(page: Path) -> list[list[str]]:
    """Every command of ShortZip's in code blocks and in backticks, as words."""
    text = page.read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"```[a-z]*\n(.*?)```", text, re.S)).replace("\\\n", " ")
    inline = re.findall(r"`([^`\n]+(?:\n[^`\n]+)?)`", re.sub(r"```.*?```", "", text, flags=re.S))
    lines = [*blocks.splitlines(), *(line.replace("\n", " ") for line in inline)]
    found = [
        re.search(r"(?:^|[\s;])((?:shortzip|python|sudo \S*python|accelerate launch|make) .*)", f" {line}")
        for line in lines
    ]
    parts = []
    for match in filter(None, found):
        try:
            parts.append(shlex.split(match[1], comments=True))
        except ValueError:  # a quotation that goes on, as in a job's script
            parts.append(match[1].split())
    return parts


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_to_files_and_headings(name: str) -> None:
    page = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), f"{name} links to {target}"
        if anchor:
            assert anchor in anchors(file), f"{name} links to {target}"


@pytest.mark.parametrize("name", NAMES)
def test_commands_name_verbs_and_files_that_are_there(name: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    for words in commands(ROOT / name):
        if words[0] == "shortzip" and len(words) > 1 and not words[1].startswith("-") and words[1] != "VERB":
            assert words[1] in VERBS, f"{name}: {' '.join(words)}"
        if words[0] == "make":
            assert words[1] in targets, f"{name}: {' '.join(words)}"
        for word in words:
            if re.fullmatch(r"(?:scripts|train|configs|tests)/[a-z0-9_/.-]+\.(?:py|yaml|json)", word):
                assert (ROOT / word).is_file(), f"{name}: {' '.join(words)}"


def flags_of() -> dict[str, list[str]]:
    """What each command takes, by `shortzip VERB` and by the file's name."""
    sections = {f"shortzip {name}": verb.section for name, verb in VERBS.items()}
    sections |= {verb.module.rsplit(".", 1)[-1]: verb.section for verb in VERBS.values()}
    sections["make_lmms_task"] = TaskConfig
    return {name: Flags(section, dict(kinds_of(section))).names for name, section in sections.items()}


def flags_given(line: str, known: dict[str, list[str]]) -> Iterator[tuple[str, str]]:
    """(command, flag) of every flag after a command of ours in a line, without the dashes."""
    parts = re.split(r"(?<![\w/.-])((?:shortzip [a-z]+|(?:scripts/|train/|shortzip\.train\.)\w+)(?=[\s.`\"']))", line)
    for command, rest in zip(parts[1::2], parts[2::2], strict=True):
        name = command if command.startswith("shortzip ") else re.split(r"[./]", command)[-1]
        if name in known:
            yield from ((name, flag) for flag in re.findall(r"(?<!\S)-(-[a-z][\w.-]*|[a-z])\b", rest))


def test_every_flag_that_is_documented_or_printed_is_there_and_spelt_the_new_way() -> None:
    known, seen = flags_of(), 0
    for page in [*PAGES, *SOURCES]:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        lines = [shlex.join(words) for words in commands(page)] if page.suffix == ".md" else text.splitlines()
        for line in lines:
            for command, flag in flags_given(line, known):
                seen += 1
                assert flag.removeprefix("-") in known[command], f"{page.relative_to(ROOT)}: {line.strip()} ({flag})"
    assert seen > 50


@pytest.mark.parametrize("name", NAMES)
def test_files_that_are_named_are_there(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    for word in re.findall(r"`((?:scripts|train|data|reduction|configs|tests)/[\w/.-]+)`", text):
        assert (ROOT / word).exists(), f"{name} names {word}"


def test_every_verb_is_in_the_table_of_commands() -> None:
    table = (ROOT / "scripts" / "README.md").read_text(encoding="utf-8")
    assert [verb for verb in VERBS if f"| `{verb}` |" not in table] == []


def test_the_front_page_stays_a_page() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
