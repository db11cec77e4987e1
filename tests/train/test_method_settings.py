"""A method and its parameters in recipes and flags: written in any way, they are the same; what is wrong is named."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from shortzip.reduction.reductions import Reductions
from shortzip.reduction.selectors import METHODS, parameters_of
from shortzip.train.run.checkpoint import CheckpointError, check_same_run
from shortzip.train.settings.budget import VisionZipConfig
from shortzip.train.settings.checks import ConfigError
from shortzip.train.settings.command_line import MENDABLE, dump_config, parse_config
from shortzip.train.settings.comparing import EvaluateConfig
from shortzip.train.settings.config import DataConfig, TuneConfig

OTHER = {"seed": 4, "space": "projected", "important": 0.25, "alpha": 0.5, "window": 3}
TAKEN = [(method, name) for method in METHODS for name in parameters_of(method)]


@dataclass(frozen=True)
class Small:
    """Settings with a budget: read as a run's are, in a fraction of the time."""

    visionzip: VisionZipConfig | None = None


def budget_of(*argv: str, **group: Any) -> VisionZipConfig | None:
    """The budget that flags give, over a recipe with `group` where one is given."""
    Path("recipe.yaml").write_text(yaml.safe_dump({"visionzip": group or None}))
    found: Small = parse_config(Small, ["--config", "recipe.yaml", *argv], program="small")
    return found.visionzip


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("method", "name"), TAKEN)
def test_recipe_flags_and_word_are_the_same(method: str, name: str) -> None:
    value = OTHER[name]
    in_recipe = budget_of(dominant=9, contextual=0, method=method, **{name: value})
    assert in_recipe is not None
    assert in_recipe == budget_of("--budget", "9+0", "--visionzip.method", method, f"--visionzip.{name}", str(value))
    assert in_recipe == budget_of("--budget", "9+0", "--method", f"{method}:{name}={value}")
    said = Reductions.parse("9+0", method=f"{method}:{name}={value}")
    assert Reductions(in_recipe.as_key()) == said
    assert said.method_words == f"{method}:{name}={value}"
    assert VisionZipConfig.of(said.visionzip or {}) == in_recipe


def test_further_ways_to_write_them() -> None:
    half = VisionZipConfig(9, 0, "scope", parameters={"alpha": 0.5})
    assert budget_of(dominant=9, contextual=0, method="scope:alpha=0.5") == half
    assert budget_of("--visionzip.alpha=0.5", "--budget", "9+0", "--method", "scope") == half
    assert budget_of("--visionzip", "{dominant: 9, contextual: 0, method: scope, alpha: 0.5}") == half
    given = ["--model", "m", "--data", "{}", "--budget", "9+0", "--method", "scope:alpha=0.5"]
    assert parse_config(EvaluateConfig, given, program="evaluate").visionzip == half


@pytest.mark.parametrize("method", METHODS)
def test_defaults_are_written_out_and_read_again(method: str) -> None:
    config = Small(budget_of("--budget", "9+0", "--method", method))
    written = yaml.safe_load(dump_config(config))["visionzip"]
    defaults = {name: default for name, (_, default) in parameters_of(method).items()}
    assert written == {"dominant": 9, "contextual": 0, "method": method, "seed": 0, **defaults}
    Path("whole.yaml").write_text(dump_config(config))
    assert parse_config(Small, ["--config", "whole.yaml"], program="small") == config


def test_later_sources_change_parameters_and_another_method_takes_them_away() -> None:
    half = {"dominant": 9, "contextual": 0, "method": "scope", "alpha": 0.5}
    assert budget_of("--visionzip.alpha", "2", **half).parameters == {"alpha": 2.0}
    assert budget_of("--method", "scope:alpha=2", **half).parameters == {"alpha": 2.0}
    assert budget_of("--visionzip.dominant", "8", **half).parameters == {"alpha": 0.5}
    assert budget_of("--method", "divprune", **half).parameters == {"space": "features"}
    assert budget_of("--method", "duet", "--visionzip.window", "2", **half).parameters == {"window": 2}
    assert budget_of("--budget", "none", **half) is None
    Path("over.yaml").write_text("visionzip: {alpha: 0.25}\n")
    assert budget_of("--config", "over.yaml", **half).parameters == {"alpha": 0.25}
    Path("over.yaml").write_text("visionzip: {method: vispruner}\n")
    assert budget_of("--config", "over.yaml", **half).parameters == {"important": 0.5}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--method", "scop"], "visionzip: method is 'scop'; it must be one of"),
        (["--method", "scope", "--visionzip.window", "2"], "method scope has no parameter 'window': it takes alpha"),
        (["--visionzip.alpha", "2"], "method visionzip has no parameter 'alpha': it takes no parameters"),
        (["--visionzip.alhpa", "2"], "there is no key 'visionzip.alhpa'; did you mean 'visionzip.alpha'"),
        (["--visionzip.dominat", "2"], "there is no key 'visionzip.dominat'; did you mean 'visionzip.dominant'"),
        (["--visionzip.parameters", "{}"], "there is no key 'visionzip.parameters'"),
        (["--method", "scope:alpha"], "several joined by"),
        (["--method", "scope:dominant=2"], "several joined by"),
        (["--method", "scope:alpha=2", "--visionzip.alpha", "2"], "visionzip.alpha is given too: give one"),
        (["--method", "scope:alpha=much"], "method scope: alpha is 'much'; a finite number is needed"),
        (["--method", "scope:alpha=nan"], "method scope: alpha is .*; a finite number is needed"),
        (["--method", "scope:alpha=-1"], "method scope: alpha is -1.0; it must be a number from 0"),
        (["--method", "vispruner:important=2"], "important is 2.0; it must be a number from 0 to 1"),
        (["--method", "duet:window=1.5"], "method duet: window is 1.5; a whole number is needed"),
        (["--method", "divprune:space=far"], r"space is 'far'; it must be one of \['features', 'projected'\]"),
        (["--budget", "7+2", "--method", "scope"], "method scope merges nothing: give all 9 tokens as dominant"),
    ],
)
def test_what_a_method_does_not_take_is_refused(argv: list[str], message: str) -> None:
    with pytest.raises(MENDABLE, match=message):
        budget_of("--budget", "9+0", *argv)


def test_a_parameter_in_a_file_is_refused_too() -> None:
    with pytest.raises(ConfigError, match=r"recipe.yaml: there is no key 'visionzip.alhpa'"):
        budget_of(dominant=9, contextual=0, method="scope", alhpa=1)
    with pytest.raises(ConfigError, match="alpha is None; a finite number is needed"):
        budget_of(dominant=9, contextual=0, method="scope", alpha=None)


@pytest.mark.parametrize(("method", "name"), TAKEN)
def test_a_run_does_not_go_on_with_another_parameter(method: str, name: str, tmp_path: Path) -> None:
    keys = [{}, {"method": method}, {"method": method, name: OTHER[name]}]
    budgets = [VisionZipConfig.of({"dominant": 9, "contextual": 0, **key}) for key in keys]
    shaping = [TuneConfig("m", DataConfig("i"), visionzip=budget).shaping_settings() for budget in budgets]
    for place, settings in enumerate(shaping):
        check_same_run(settings, settings, tmp_path)
        with pytest.raises(CheckpointError, match="visionzip"):
            check_same_run(settings, shaping[place - 1], tmp_path)
