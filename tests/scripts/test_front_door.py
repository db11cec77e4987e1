"""`shortzip VERB`: what it answers before anything heavy is imported, and the one style of its flags."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from shortzip.scripts.__main__ import VERBS, main
from shortzip.train.settings.checks import ConfigError
from shortzip.train.settings.command_line import kinds_of, load_config, parse_config
from shortzip.train.settings.commands import (
    CalibrateConfig,
    ConvertConfig,
    EstimateConfig,
    FetchConfig,
    PrepareConfig,
    PublishConfig,
    ShowConfig,
)
from shortzip.train.settings.comparing import EvaluateConfig, PapersConfig
from shortzip.train.settings.config import TuneConfig
from shortzip.train.settings.flags import Flags
from shortzip.train.settings.frontier import FrontierConfig
from shortzip.train.settings.recipes import find_recipe

WITHOUT_THEM = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "transformers", "accelerate", "datasets", "matplotlib", "gradio"}:
            tried.append(name)
            raise ImportError(f"{name} is blocked")
tried = []
sys.meta_path.insert(0, Blocked())
from shortzip.scripts.__main__ import VERBS, main
for verb in VERBS:
    try:
        main([verb, "--help"])
    except SystemExit as end:
        assert not end.code, (verb, end.code)
    else:
        raise AssertionError(f"{verb} --help went on")
try:
    main(["tune", "--config", "llava-1.5-7b-3090", "--budget", "54+10", "--freeze", "60%", "--print_config"])
except SystemExit as end:
    assert not end.code, end.code
assert not tried, tried
"""


def read(section: type, *argv: str, recipe: str | None = None) -> Any:
    return parse_config(section, argv, default=Path(find_recipe(recipe)) if recipe else None, program="test")


def test_help_of_every_verb_needs_nothing_that_computes() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_THEM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: shortzip") == len(VERBS)


def test_every_verb_has_its_settings_and_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for name, verb in VERBS.items():
        assert dataclasses.is_dataclass(verb.section), name
    with pytest.raises(SystemExit):
        main(["publish", "-h"])
    assert capsys.readouterr().out.startswith("usage: shortzip publish RUN [--KEY VALUE ...]")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pubish"], "there is no verb 'pubish'; did you mean 'publish'?"),
        (["publish", "x", "--repo_di", "a/b"], "there is no key 'repo_di'; did you mean 'repo_id'?"),
        (["tune", "--instruction", "x"], "there is no key 'instruction'; did you mean 'instructions'?"),
        (["evaluate", "--buget", "1+1"], "there is no key 'buget'; did you mean 'budget'?"),
        (["estimate", "7b"], "'7b' stands there without a flag"),
        (["publish", "--repo_id", "a/b"], "run"),
        (["convert", "a", "b", "--output", "c"], "one model is taken, and there are a, b"),
    ],
)
def test_what_is_mistyped_names_the_nearest(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert str(stop.value.code).startswith("error: ")
    assert said in str(stop.value.code)


def test_the_same_thing_has_the_same_flag() -> None:
    """Each of them is a key or a short form of every command that has the thing."""
    model = {"tune", "demo", "evaluate", "papers", "estimate", "calibrate", "show", "app", "convert"}
    model |= {"answer", "serve", "rehearse", "calibrate_budget"}
    calibrating = {"calibrate", "calibrate_budget"}
    for flag, verbs in {
        "model": model,
        "instructions": {"tune", "demo", "evaluate", "calibrate", "calibrate_budget", "prepare"},
        "image_root": {"tune", "demo", "evaluate", "calibrate", "calibrate_budget", "prepare", "answer"},
        "budget": {"tune", "demo", "evaluate", "papers", "frontier", "estimate", "show", "rehearse"} | calibrating,
        "freeze": {"tune", "demo", "evaluate", "papers", "frontier", "estimate", "calibrate", "rehearse"},
        "output": VERBS.keys() - {"fetch", "publish", "app", "serve"},
        "overwrite": {"tune", "demo", "evaluate", "estimate", "show", "prepare", "answer", "rehearse"} | calibrating,
        "config": VERBS.keys(),
    }.items():
        having = {
            name for name, verb in VERBS.items() if flag in Flags(verb.section, dict(kinds_of(verb.section))).names
        }
        assert having == verbs, flag


def test_short_forms_are_the_keys_they_stand_for() -> None:
    short = load_config(
        ["--instructions", "a.json", "--image_root=b", "--output", "c", "--overwrite", "--save_steps", "3"]
    )
    long = load_config(
        ["--data.instructions", "a.json", "--data.image_root", "b", "--output_dir", "c",
         "--overwrite_output_dir", "true", "--save_steps", "3"]
    )  # fmt: skip
    assert short == long
    assert read(CalibrateConfig, "--data.instructions", "a.json") == read(CalibrateConfig, "--instructions", "a.json")


@pytest.mark.parametrize(
    ("flags", "visionzip", "shortv"),
    [
        (["--budget", "20+5", "--freeze", "60%"], (20, 5), (None, "60%")),
        (["--freeze", "3,1"], (12, 4), ([3, 1], None)),
        (["--shortv.layers", "[3]", "--shortv.freeze", "null", "--freeze", "2"], (12, 4), (None, "2")),
        (["--budget", "none"], None, (None, "60%")),
        (["--freeze", "none"], (12, 4), None),
        (["--freeze=0%"], (12, 4), None),
    ],
)
def test_budget_and_freeze_of_a_run(flags: list[str], visionzip: Any, shortv: Any) -> None:
    found = load_config(flags)
    zipped, frozen = found.visionzip, found.shortv
    assert (None if zipped is None else (zipped.dominant, zipped.contextual)) == visionzip
    assert (
        None if frozen is None else (frozen.layers, None if frozen.freeze is None else str(frozen.freeze))
    ) == shortv


def test_budget_and_freeze_of_the_commands_that_compare() -> None:
    found = read(EvaluateConfig, "--model", "a", "--budget", "20+5", "--freeze", "3,1", "--model", "b")
    assert found.model == ["a", "b"]
    assert (found.visionzip.dominant, found.visionzip.contextual, found.shortv.layers) == (20, 5, [3, 1])
    papers = read(PapersConfig, "--config", "demo", "--budget", "12+4,20+5", "--freeze", "3,1", recipe=None)
    assert (papers.budgets, papers.layers) == (["12+4", "20+5"], ["1+3"])
    frontier = read(FrontierConfig, "--budget", "12+4", "--freeze", "0,60%", recipe="frontier-demo")
    assert (frontier.budgets, frontier.freeze) == (["12+4"], ["0", "60%"])
    assert (read(EstimateConfig, "--budget", "12+4").budget, read(ShowConfig, "--budget", "1+1").budget) == (
        "12+4",
        "1+1",
    )
    with pytest.raises(ConfigError, match=r"which layers these are is not known here; list them"):
        read(PapersConfig, "--config", "llava-1.5-7b", "--freeze", "60%")
    with pytest.raises(ConfigError, match="list them here"):
        read(EvaluateConfig, "--model", "a", "--freeze", "60%")


def test_words_without_a_flag() -> None:
    assert read(ShowConfig, "a.png", "b.png", "--model", "m", "c.png", "--overwrite").images == [
        "a.png",
        "b.png",
        "c.png",
    ]
    assert read(FetchConfig, "--to", "images", "images.txt").images == "images.txt"
    published = read(PublishConfig, "--dry_run", "runs/a", "--private", "false", "--repo_id", "u/n")
    assert (str(published.run), published.dry_run, published.private) == ("runs/a", True, False)
    assert read(ConvertConfig, "--model", "m", "--output", "o").model == "m"


@pytest.mark.parametrize(
    ("section", "old", "new"),
    [
        (PrepareConfig, ["x.json", "-o", "o", "--image-root=r", "--drop-missing", "--num-workers", "3"],
         ["x.json", "--output", "o", "--image_root=r", "--drop_missing", "--num_workers", "3"]),
        (PublishConfig, ["r", "--repo-id", "u/n", "--dry-run"], ["r", "--repo_id", "u/n", "--dry_run"]),
        (ConvertConfig, ["m", "-o", "o", "--mm-projector", "p"], ["m", "--output", "o", "--mm_projector", "p"]),
        (ShowConfig, ["a.png", "--budgets", "1+1,2+2"], ["a.png", "--budget", "1+1,2+2"]),
    ],
)  # fmt: skip
def test_earlier_spellings_are_read_with_a_line_that_says_the_new_one(
    section: type, old: list[str], new: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    expected = read(section, *new)
    assert capsys.readouterr().err == ""
    assert read(section, *old) == expected
    told = capsys.readouterr().err.splitlines()
    flags = [(word, name) for word, name in zip(old, new, strict=True) if word != name]
    assert told == [
        f"{was.partition('=')[0]} is an old spelling, read for this version only: write {now.partition('=')[0]}"
        for was, now in flags
    ]


@pytest.mark.parametrize("verb", ["tune", "prepare", "estimate", "papers"])
def test_the_printed_config_is_whole_and_reads_back(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {
        "tune": ["--config", "llava-1.5-7b-3090", "--budget", "54+10", "--freeze", "60%", "--report_to", "[]"],
        "prepare": ["x.json", "--output", "o"],
        "estimate": ["--output", "o.json"],
        "papers": ["--config", "llava-1.5-7b", "--budget", "54+10"],
    }[verb]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main([verb, *given, "--print_config"])
    assert not stop.value.code
    printed = capsys.readouterr().out
    section = VERBS[verb].section
    (tmp_path / "whole.yaml").write_text(printed)
    assert read(section, "--config", "whole.yaml") == read(section, *given)
    assert list(yaml.safe_load(printed)) == [item.name for item in dataclasses.fields(section)]
    assert not (tmp_path / "checkpoints").exists()


def test_tune_and_the_script_read_the_same() -> None:
    assert read(TuneConfig, recipe="demo") == load_config([])
