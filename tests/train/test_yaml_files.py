"""YAML settings: words stay words, and what YAML would take in silence is refused by line."""

import time
from pathlib import Path
from typing import Any

import pytest

from shortzip.train.settings.checks import ConfigError
from shortzip.train.settings.command_line import kinds_of, load_config
from shortzip.train.settings.config import TuneConfig
from shortzip.train.settings.yaml_files import read_settings

KINDS = dict(kinds_of(TuneConfig))
BASE = "model: some/release\ndata: {instructions: train.json}\n"


def read(folder: Path, text: str | bytes) -> dict[str, Any]:
    path = folder / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_settings(str(path), KINDS)


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("report_to: null", "report_to", []),
        ("report_to:", "report_to", []),
        ("mixed_precision: no", "mixed_precision", "no"),
        ("run_name: on", "run_name", "on"),
        ("run_name: 007", "run_name", "007"),
        ("run_name: 2031-02-03", "run_name", "2031-02-03"),
        ("overwrite_output_dir: yes", "overwrite_output_dir", True),
        ("learning_rate: 3E-5", "learning_rate", 3e-5),
        ("<<: {seed: 3}", "seed", 3),
        ("save_total_limit: ~", "save_total_limit", None),
    ],
)
def test_the_type_of_a_key_decides_what_a_scalar_means(tmp_path: Path, text: str, key: str, value: Any) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(BASE + text)
    assert getattr(load_config(["--config", str(path)]), key) == value


def test_a_number_of_layers_stays_a_number(tmp_path: Path) -> None:
    assert read(tmp_path, "shortv: {freeze: 19}")["shortv"] == {"freeze": 19}
    assert read(tmp_path, "shortv: {freeze: 60%}")["shortv"] == {"freeze": "60%"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nweight_decay: 0\nseed: 2", "seed stands in line 1 and in line 3"),
        ("fastv: {layer: 2, keep: 0.5}\nfastv: {layer: 3, keep: 0.5}", "fastv stands in line 1 and in line 2"),
        ("fastv.layer: 2\nfastv: {layer: 3, keep: 0.5}", "fastv.layer stands in line 1 and in line 2"),
        ("\nseed: 0123", r"line 2: seed is 0123, which YAML reads in two ways: write 123"),
        ("save_steps: 1:40", "save_steps is 1:40, which YAML reads in two ways"),
        ("shortv: {layers: [1, 07]}", r"shortv.layers\[1\] is 07"),
        ("? [1, 2]\n: 3", "a key must be a word"),
        ("seed: !!python/name:os.system 1", "the tag .* means nothing here"),
        ("- seed", "found a list"),
        ("seed", "found a str"),
        ("a: 1\n---\nb: 2", "is not YAML"),
        ("a: " + "[" * 1200, "more than 20 levels"),
        ("a: " + "{b: " * 30 + "1" + "}" * 30, "more than 20 levels"),
        ("a: &again [*again]", "more than 20 levels"),
        ("a: 1 # " + "x" * 300_000, "300,007 characters"),
        ("seed: 1".encode("utf-16"), "is not UTF-8 text"),
    ],
)
def test_what_yaml_would_take_in_silence_is_refused(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=f"recipe.yaml.*{message}"):
        read(tmp_path, text)


def test_a_bomb_of_aliases_is_refused_at_once(tmp_path: Path) -> None:
    levels = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 15)]
    started = time.process_time()
    with pytest.raises(ConfigError, match="more than 10,000 values"):
        read(tmp_path, "\n".join(["a0: &a0 [x, x]", *levels]))
    assert time.process_time() - started < 5


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "null"])
def test_an_empty_file_holds_no_settings(tmp_path: Path, text: str) -> None:
    assert read(tmp_path, text) == {}
    path = tmp_path / "recipe.yaml"
    with pytest.raises(ConfigError, match=r"required: model, data\.instructions"):
        load_config(["--config", str(path)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: null", "seed is null, and needs a value"),
        ("data: {num_workers: null}", "data.num_workers is null"),
        ("report_to: wandb", r"report_to: 'wandb' is not of type list: write \[wandb\], or \[\] for none"),
        ("mixed_precision: off", r"mixed_precision: 'off' is not of type Literal\['no', 'bf16'\]"),
        ("eval_steps: no", r"eval_steps: a truth value \(false\) is not of type int or null"),
        ("visionzip: 12+4", r"visionzip: '12\+4' is no group of keys: visionzip.dominant"),
        ("visionzip: {dominant: 12}", "visionzip needs visionzip.dominant, visionzip.contextual"),
    ],
)
def test_a_value_that_does_not_fit_names_the_key_and_the_cure(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text if text.startswith("data") else BASE + text)
    with pytest.raises(ConfigError, match=message):
        load_config(["--config", str(path)])


def test_a_switch_needs_no_value_and_a_null_list_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(BASE)
    for arguments in (
        ["--overwrite_output_dir", "--report_to", "null"],
        ["--report_to=null", "--overwrite_output_dir"],
    ):
        config = load_config([f"--config={path}", *arguments])
        assert (config.overwrite_output_dir, config.report_to) == (True, [])
