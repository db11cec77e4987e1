"""The config: what is read, what is refused, and what the refusal says."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shortzip.train.settings import command_line as command_line_module
from shortzip.train.settings import config as config_module
from shortzip.train.settings.checks import ConfigError
from shortzip.train.settings.command_line import check_keys, dump_config, known_keys, load_config
from shortzip.train.settings.config import TuneConfig

YAML = """
model: some/release
data:
  instructions: train.json
  eval_instructions: held-out.json
visionzip: {dominant: 12, contextual: 4}
learning_rate: 1e-4
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(YAML)
    return path


def load(recipe: Path, *arguments: str) -> TuneConfig:
    return load_config(["--config", str(recipe), *arguments])


def test_the_command_line_wins_over_yaml_and_yaml_over_defaults(recipe: Path) -> None:
    config = load(
        recipe, "--visionzip.dominant", "20", "--data.instructions=other.json", "--report_to", "[tensorboard]"
    )
    assert config.visionzip is not None
    assert (config.visionzip.dominant, config.visionzip.contextual) == (20, 4)
    assert config.learning_rate == 1e-4  # YAML 1.1 would read a string
    assert config.data.instructions == "other.json"
    assert config.report_to == ["tensorboard"]
    assert config.global_batch_size == 128
    assert load(recipe, "--visionzip", "null").visionzip is None


def test_without_a_config_the_demo_is_read(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_line_module, "DEFAULT_CONFIG", recipe)
    assert load_config(["--seed", "3"]).model == "some/release"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--learning_rte", "1"], "'learning_rate'"),
        (["--data.instruction", "x"], "'data.instructions'"),
        (["--fraction", "0.1"], "'data.fraction'"),
        (["--visionzip.dominat=3"], "'visionzip.dominant'"),
        (["--shortv.layer", "[1]"], "'shortv.layers'"),
    ],
)
def test_an_unknown_key_on_the_command_line_names_the_nearest(recipe: Path, arguments: list[str], named: str) -> None:
    with pytest.raises(ConfigError, match=f"command line.*{arguments[0][2:].split('=')[0]}.*did you mean {named}"):
        load(recipe, *arguments)


def test_an_unknown_key_in_yaml_names_the_nearest_and_the_file(recipe: Path) -> None:
    recipe.write_text(YAML + "global_batch: 3\n")
    with pytest.raises(ConfigError, match=r"recipe.yaml.*'global_batch'; did you mean 'global_batch_size'"):
        load(recipe)
    recipe.write_text(YAML.replace("eval_instructions", "eval_instruction"))
    with pytest.raises(ConfigError, match=r"'data.eval_instruction'; did you mean 'data.eval_instructions'"):
        load(recipe)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning_rate", "abc"], "learning_rate: 'abc' is not of type float"),
        (["--max_steps", "3.5"], "max_steps: '3.5' is not of type int or null"),
        (["--shortv.layers", "[1, x]"], "shortv.layers: 'x' is not of type int or null"),
        (["--mixed_precision", "fp16"], r"mixed_precision: 'fp16' .*'no', 'bf16'"),
        (["--report_to", "[wandbb]"], r"report_to: 'wandbb' .*'wandb', 'tensorboard'"),
        (["--overwrite_output_dir", "maybe"], "overwrite_output_dir: 'maybe' is not of type bool"),
        (["stray"], "stray"),
        (["--seed"], "seed"),
        (["--config", "no-such.yaml"], "no-such.yaml: there is no such file"),
    ],
)
def test_a_wrong_type_names_the_key_and_the_value(recipe: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(recipe, *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max_steps", "3", "--num_train_epochs", "1"], "both say how long"),
        (["--max_steps", "0"], "max_steps is 0: at least 1"),
        (["--global_batch_size", "0"], "global_batch_size is 0"),
        (["--learning_rate", "-1"], "learning_rate is -1"),
        (["--learning_rate", ".nan"], "learning_rate is nan"),
        (["--max_grad_norm", ".inf"], "max_grad_norm is inf"),
        (["--warmup_ratio", "1"], "warmup_ratio is 1"),
        (["--num_train_epochs", "0"], "num_train_epochs is 0"),
        (["--lr_scheduler_type", "constant"], "constant_with_warmup"),
        (["--eval_steps", "5", "--data.eval_instructions", "null"], "set data.eval_instructions"),
        (["--control", "true", "--data.eval_instructions", "null"], "control adds a row"),
        (["--control", "true", "--visionzip", "null"], "control is the same tuning"),
        (["--overwrite_output_dir", "true", "--resume_from_checkpoint", "latest"], "choose one"),
        (["--report_to", "[tensorboard,tensorboard]"], "twice"),
        (["--shortv.layers", "[1]", "--shortv.freeze", "3"], "set the other one to null"),
        (["--shortv.freeze", "0.6"], r"shortv.freeze is '0.6': .*a share \(60%\)"),
        (["--max_memory", "lots"], "max_memory: memory 'lots': write it as 24GiB"),
        (["--shortv.freeze", "60%", "--shortv.calibration_samples", "0"], "calibration_samples is 0"),
        (["--data.fraction", "0"], "data.fraction is 0"),
        (["--data.max_bad_fraction", "2"], "max_bad_fraction is 2"),
        (["--data.num_workers", "-1"], "data.num_workers is -1"),
        (["--data.demo_scenes.eval_seed", "101"], "nothing would be held out"),
        (["--save_total_limit", "0"], "save_total_limit is 0"),
        (["--seed", "-1"], "seed is -1: 0 to 4294967295 are allowed"),
        (["--data.demo_scenes.train_seed", "4294967296"], "train_seed is 4294967296: 0 to 4294967295"),
    ],
)
def test_what_does_not_go_together_is_refused_when_read(recipe: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(recipe, *arguments)


def test_a_tracker_whose_package_is_missing_names_the_extra(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'shortzip\[wandb\]'"):
        load(recipe, "--report_to", "[wandb]")


def test_yaml_that_is_no_mapping_is_refused(recipe: Path) -> None:
    recipe.write_text("- model\n")
    with pytest.raises(ConfigError, match="keys and values are needed, found a list"):
        load(recipe)
    recipe.write_text("model: [")
    with pytest.raises(ConfigError, match="is not YAML"):
        load(recipe)
    recipe.write_text(YAML.replace("model: some/release", ""))
    with pytest.raises(ConfigError, match="model"):
        load(recipe)


def test_the_config_as_resolved_reads_back_equal(recipe: Path, tmp_path: Path) -> None:
    config = load(recipe, "--shortv.freeze", "60%", "--report_to", "[tensorboard]", "--learning_rate", "3e-7")
    written = tmp_path / "config.yaml"
    written.write_text(dump_config(config))
    assert load_config(["--config", str(written)]) == config


def test_help_documents_each_key(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load_config(["--config", str(recipe), "--help"])
    shown = capsys.readouterr().out
    for key, _ in known_keys(TuneConfig):
        assert key in shown, f"--help says nothing about {key}"


KEYS = [key for key, _ in known_keys(TuneConfig)]


@given(key=st.sampled_from(KEYS), position=st.integers(0, 40), letter=st.sampled_from("abxyz_"))
@settings(max_examples=200, deadline=None)
def test_one_wrong_letter_never_passes_and_the_key_meant_is_named(key: str, position: int, letter: str) -> None:
    position = min(position, len(key) - 1)
    typo = key[:position] + letter + key[position + 1 :]
    if typo in KEYS:
        return
    with pytest.raises(ConfigError, match="did you mean"):
        check_keys([typo], KEYS, "here")


def test_the_demo_can_be_continued() -> None:
    assert load_config(["--resume_from_checkpoint", "latest"]).resume_from_checkpoint == "latest"
