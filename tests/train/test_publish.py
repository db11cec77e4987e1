"""Publishing through huggingface_hub's real client, in processes of their own, to a Hub on the loopback interface."""

import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from elsewhere import PROMPT, environment, logits_from_hub, picture
from forks import Forks, Result
from hub_server import READER, WRITER, Hub
from originals import copy_of_release
from runs import ROOT, run_here, write_recipe

from shortzip.data.subset import SubsetOptions, prepare_subset
from shortzip.train.publish.model_card import command_of, licence_of, write_card
from shortzip.train.publish.push import PublishError, check_repo_id
from shortzip.train.release.loading import load_release
from shortzip.train.release.opening import read_release_projector

PUBLISH = str(ROOT / "scripts" / "publish.py")
TUNE = str(ROOT / "train" / "tune_projector.py")
Publish = Callable[..., Result]
BASE = "maker/tiny-llava"
LICENCE = "---\nlicense: llama2\n---\nA tiny LLaVA.\n"


@pytest.fixture(scope="module")
def served() -> Iterator[Hub]:
    with Hub() as running:
        yield running


@pytest.fixture(scope="module")
def forks(served: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Processes whose huggingface_hub talks to the loopback Hub."""
    with Forks(environment(served, tmp_path_factory.mktemp("home"), None)) as running:
        yield running


@pytest.fixture
def hub(served: Hub) -> Hub:
    served.clear()
    return served


@dataclass
class Finished:
    """A run that used a folder, with its evaluation and a picture; and the Hub's copy of the release it used."""

    folder: Path
    release: Path


@pytest.fixture(scope="module")
def finished(
    tiny_release: Path, tiny_instructions: Path, tiny_held_out: Path, tmp_path_factory: pytest.TempPathFactory
) -> Finished:
    root = tmp_path_factory.mktemp("finished")
    release = root / "tiny-llava"
    shutil.copytree(tiny_release, release)
    (release / "README.md").write_text(LICENCE)
    recipe = write_recipe(
        root / "recipe.yaml", release, tiny_instructions, data={"eval_instructions": str(tiny_held_out)}, max_steps=3
    )
    folder = run_here(recipe, root / "my-run")
    return Finished(folder, release)


@pytest.fixture
def publish(forks: Forks, hub: Hub) -> Callable[..., Result]:
    """Runs scripts/publish.py with the given arguments and token."""

    def run(*arguments: str, token: str | None = WRITER) -> Result:
        return forks.run(PUBLISH, *arguments, HF_TOKEN=token)

    return run


def nowhere(secret: str, run: Result, hub: Hub, *folders: Path) -> None:
    """The token stands in no output, no published file, no file of the run."""
    assert secret not in run.stdout + run.stderr
    for repository in hub.repositories.values():
        for files in repository.commits.values():
            assert all(secret.encode() not in blob.content for blob in files.values())
    for folder in folders:
        for path in folder.rglob("*"):
            assert not path.is_file() or secret.encode() not in path.read_bytes(), path


def logits_here(folder: Path) -> torch.Tensor:
    model, processor = load_release(str(folder))
    inputs = processor(images=picture(), text=PROMPT, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits


def test_projector_shape_from_push_to_loading(hub: Hub, publish: Publish, finished: Finished, tmp_path: Path) -> None:
    """The whole push; what others load from the Hub has the run's own logits, over the release it names there."""
    commit = hub.add(BASE, finished.release)
    run = publish(str(finished.folder), "--repo_id", "user/tuned", "--base", BASE)
    assert run.returncode == 0, run.stderr
    assert f"{hub.url}/user/tuned/tree/v1" in run.stdout
    assert 'AutoModelForImageTextToText.from_pretrained("user/tuned", trust_remote_code=True)' in run.stdout
    repository = hub.repositories["user/tuned"]
    assert repository.tags == {"v1": repository.head}
    files = hub.files("user/tuned")
    assert "projector.safetensors" in files
    assert not any(name.startswith("model") and name.endswith(".safetensors") for name in files)
    base = json.loads(files["config.json"])["base_release"]
    assert (base["name"], base["revision"]) == (BASE, commit)
    assert f"base_model: {BASE}" in files["README.md"].decode()
    assert json.loads(files["lineage.json"])[-1]["name"] == BASE
    nowhere(WRITER, run, hub, finished.folder, tmp_path)
    assert torch.equal(
        logits_from_hub(hub, "user/tuned", tmp_path / "home", tmp_path / "w"), logits_here(finished.folder)
    )
    text = b"".join(content for name, content in files.items() if not name.endswith((".safetensors", ".png")))
    assert str(finished.release).encode() not in text, "a path of this machine was published"


def test_full_shape_private_and_another_round_from_the_hub(
    hub: Hub, publish: Publish, forks: Forks, finished: Finished, tiny_instructions: Path, tmp_path: Path
) -> None:
    arguments = [str(finished.folder), "--repo_id", "user/tuned", "--shape", "full", "--tag", "first"]
    run = publish(*arguments, "--private")
    assert run.returncode == 0, run.stderr
    assert hub.repositories["user/tuned"].private
    assert list(hub.repositories["user/tuned"].tags) == ["first"]
    assert "model.safetensors" in hub.files("user/tuned")
    refused = publish(str(finished.folder), "--repo_id", "user/tuned", token=None)
    assert "error:" in refused.stderr

    # Another round: the published checkpoint is a release, with another budget; its card tells the lineage.
    recipe = write_recipe(
        tmp_path / "round2.yaml", Path("user/tuned"), tiny_instructions, max_steps=2, revision="first",
        visionzip={"dominant": 3, "contextual": 1}, push_to_hub=True, hub_model_id="user/again",
    )  # fmt: skip
    second = tmp_path / "round2"
    run = forks.run(
        TUNE, "--config", str(recipe), "--output_dir", str(second), HF_TOKEN=WRITER, ACCELERATE_USE_CPU="true"
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"{hub.url}/user/again/tree/v1" in run.stdout
    nowhere(WRITER, run, hub, second)
    files = hub.files("user/again")
    base = json.loads(files["config.json"])["base_release"]
    assert (base["name"], base["revision"]) == ("user/tuned", hub.repositories["user/tuned"].head)
    card = files["README.md"].decode()
    lineage = card.split("## Lineage")[1].split("##")[0]
    assert re.search(r"1\. tiny-llava: all visual tokens\n1\. user/tuned at [0-9a-f]{40}: 4\+2 visual tokens", lineage)
    assert "base_model: user/tuned" in card


def test_from_llavas_own_release_to_the_hub_in_both_layouts(
    hub: Hub, publish: Publish, forks: Forks, tiny_instructions: Path, tmp_path: Path
) -> None:
    """A release in LLaVA's own layout, tuned and published: as a full checkpoint, and back in LLaVA's layout."""
    release = copy_of_release(tmp_path)
    recipe = write_recipe(tmp_path / "recipe.yaml", release, tiny_instructions, max_steps=2)
    folder = tmp_path / "run"
    arguments = ["--config", str(recipe), "--output_dir", str(folder)]
    run = forks.run(TUNE, *arguments, ACCELERATE_USE_CPU="true")
    assert run.returncode == 0, run.stderr
    run = publish(str(folder), "--repo_id", "user/tuned", "--shape", "full")
    assert run.returncode == 0, run.stderr
    wanted = logits_here(folder)
    assert torch.equal(logits_from_hub(hub, "user/tuned", tmp_path / "home", tmp_path / "w"), wanted)

    arguments = [str(folder), "--shape", "llava", "--repo_id"]
    assert "let the name contain 'llava'" in publish(*arguments, "user/tuned").stderr
    assert "is not on the Hub: choose --shape full" in publish(*arguments, "user/tuned-llava").stderr
    run = publish(*arguments, "user/tuned-llava", "--base", "maker/llava-v1.5-tiny")
    assert run.returncode == 0, run.stderr
    assert "llava.serve.cli --model-path tuned-llava --model-base maker/llava-v1.5-tiny" in run.stdout
    assert "AutoProcessor" not in run.stdout  # three lines of transformers do not load this layout
    files = hub.files("user/tuned-llava")
    assert {"mm_projector.bin", "config.json", "README.md"} <= files.keys()
    assert json.loads(files["config.json"])["_name_or_path"] == "maker/llava-v1.5-tiny"
    assert "--model-base maker/llava-v1.5-tiny" in files["README.md"].decode()
    found = read_release_projector(folder / "final")
    downloaded = tmp_path / "mm_projector.bin"
    downloaded.write_bytes(files["mm_projector.bin"])
    theirs = torch.load(downloaded, weights_only=True)
    assert torch.equal(theirs["model.mm_projector.2.bias"], found["linear_2.bias"])


def test_busy_failing_and_cut_off(hub: Hub, publish: Publish, finished: Finished, tmp_path: Path) -> None:
    """429 with Retry-After, 5xx and cut connections at every kind of request; the push ends whole."""
    hub.fail("GET", "whoami", 503)
    hub.fail("POST", "repos/create", 429, Retry_After="1")
    hub.fail("POST", "preupload", 500)
    hub.fail("POST", "objects/batch", 502)
    hub.fail("PUT", "/objects/", 503)
    hub.fail("PUT", "/objects/", "cut")
    hub.fail("POST", "/commit/", "cut")
    hub.fail("POST", "/commit/", "lost")
    hub.fail("POST", "/tag/", 504)
    run = publish(str(finished.folder), "--repo_id", "user/tuned", "--shape", "full")
    assert run.returncode == 0, run.stderr
    assert all(fault.times == 0 for fault in hub.faults), [fault for fault in hub.faults if fault.times]
    repository = hub.repositories["user/tuned"]
    assert len(repository.commits) == 2, "the lost answer made a second commit"
    assert repository.tags == {"v1": repository.head}
    final = finished.folder / "final"
    assert hub.files("user/tuned")["model.safetensors"] == (final / "model.safetensors").read_bytes()
    assert "the Hub answered 429; again in 1 s" in run.stdout
    nowhere(WRITER, run, hub, tmp_path)


def test_killed_in_the_middle_and_run_again(hub: Hub, publish: Publish, forks: Forks, finished: Finished) -> None:
    uploading, is_killed = threading.Event(), threading.Event()

    def hold(oid: str, received: int) -> None:
        if received > 1 << 16:
            uploading.set()
            is_killed.wait(120)

    hub.on_upload = hold
    arguments = [str(finished.folder), "--repo_id", "user/tuned", "--shape", "full"]
    killed = forks.start(PUBLISH, *arguments, HF_TOKEN=WRITER)
    try:
        assert uploading.wait(120)
        os.kill(killed.pid, signal.SIGKILL)
        assert killed.wait().returncode == -signal.SIGKILL
    finally:
        is_killed.set()
    hub.on_upload = None
    assert set(hub.files("user/tuned")) == {".gitattributes"}, "half a push was visible"
    run = publish(*arguments)
    assert run.returncode == 0, run.stderr
    commits = len(hub.repositories["user/tuned"].commits)
    # Killed after its commit, before its tag: nothing is sent twice, and the tag comes.
    hub.repositories["user/tuned"].tags.clear()
    uploads = sum(method == "PUT" for method, _ in hub.requests)
    run = publish(*arguments)
    assert run.returncode == 0, run.stderr
    assert len(hub.repositories["user/tuned"].commits) == commits
    assert sum(method == "PUT" for method, _ in hub.requests) == uploads
    assert hub.repositories["user/tuned"].tags == {"v1": hub.repositories["user/tuned"].head}


@pytest.mark.parametrize(
    ("token", "name", "said"),
    [
        (READER, "user/tuned", "this token may not write to user: use one that may"),
        (WRITER, "company/tuned", "this token may not write to company"),
        ("hf_" + "x" * 30, "user/tuned", "the token is missing, expired or mistyped: `hf auth login`"),
        (None, "user/tuned", "publishing needs a token of the Hub: `hf auth login`"),
    ],
)
def test_tokens_without_rights(
    hub: Hub, publish: Publish, finished: Finished, tmp_path: Path, token: str | None, name: str, said: str
) -> None:
    run = publish(str(finished.folder), "--repo_id", name, "--shape", "full", token=token)
    assert run.returncode == 1
    assert said in run.stderr
    assert "Traceback" not in run.stderr
    assert not hub.repositories
    if token:
        nowhere(token, run, hub, tmp_path)


def test_a_name_that_exists(hub: Hub, publish: Publish, finished: Finished, tmp_path: Path) -> None:
    hub.add("user/tuned", finished.release)
    before = hub.files("user/tuned")
    arguments = [str(finished.folder), "--repo_id", "user/tuned", "--shape", "full"]
    run = publish(*arguments)
    assert run.returncode == 1
    assert "user/tuned exists and holds other files (README.md, " in run.stderr
    assert "give another --repo_id, or --update" in run.stderr
    assert hub.files("user/tuned") == before
    old = hub.repositories["user/tuned"].head
    hub.repositories["user/tuned"].tags["v7"] = old
    run = publish(*arguments, "--update", "--private")
    assert "exists and is public, but --private is given" in run.stderr
    run = publish(*arguments, "--update")
    assert run.returncode == 0, run.stderr
    repository = hub.repositories["user/tuned"]
    assert repository.tags == {"v7": old, "v8": repository.head}
    assert "lineage.json" in hub.files("user/tuned")
    assert hub.files("user/tuned", "v7") == before


def test_dry_run_shows_all_and_touches_nothing(hub: Hub, publish: Publish, finished: Finished) -> None:
    arguments = [str(finished.folder), "--repo_id", "user/tuned", "--shape", "full", "--dry_run"]
    run = publish(*arguments, token=None)
    assert run.returncode == 0, run.stderr
    assert not hub.requests
    for name in ("README.md", "model.safetensors", "config.json", "modeling_reduced_llava.py", "kept_tokens.png"):
        assert re.search(rf"^ *[\d,]+  {re.escape(name)}$", run.stdout, re.MULTILINE), name
    assert "adapter" not in run.stdout
    assert "## Licence" in run.stdout


def test_the_base_must_be_the_release_that_was_tuned(
    hub: Hub, publish: Publish, finished: Finished, tmp_path: Path
) -> None:
    arguments = [str(finished.folder), "--repo_id", "user/tuned"]
    run = publish(*arguments)
    assert "shape projector names the release that it belongs to, and" in run.stderr
    assert "is not on the Hub: choose --shape full, or name the same release on the Hub with --base" in run.stderr
    run = publish(*arguments, "--base", "maker/nothing")
    assert "--base maker/nothing: no such repository" in run.stderr
    hub.fail("GET", "models/maker/nothing", 403)
    run = publish(*arguments, "--base", "maker/nothing")
    assert "error: --base maker/nothing: the Hub answered 403: try again later" in run.stderr
    other = tmp_path / "other"
    shutil.copytree(finished.release, other)
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    hub.add(BASE, other)
    run = publish(*arguments, "--base", BASE)
    assert "--base maker/tiny-llava is another release than" in run.stderr
    assert "model.safetensors has other content there" in run.stderr
    assert "user/tuned" not in hub.repositories


def test_a_token_in_a_file_is_never_published(hub: Hub, publish: Publish, finished: Finished, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished.folder, folder)
    (folder / "final" / "chat_template.jinja").write_text(f"{{# {WRITER} #}}")
    run = publish(str(folder), "--repo_id", "user/tuned", "--shape", "full")
    assert "chat_template.jinja holds a token of the Hub: take it out, and revoke that token" in run.stderr
    assert WRITER not in run.stdout + run.stderr
    assert not hub.repositories


def test_a_run_whose_hub_refuses_ends_well(
    hub: Hub, forks: Forks, tiny_release: Path, tiny_instructions: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(
        tmp_path / "recipe.yaml", tiny_release, tiny_instructions, max_steps=1, warmup_ratio=0.0, push_to_hub=True,
        hub_model_id="user/tuned", hub_shape="full",
    )  # fmt: skip
    arguments = [TUNE, "--config", str(recipe), "--output_dir"]
    hub.fail("GET", "whoami", 401, times=9)
    folder = tmp_path / "run"
    run = forks.run(*arguments, str(folder), HF_TOKEN=WRITER, ACCELERATE_USE_CPU="true")
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("hf auth login") == 1
    assert f"shortzip publish {folder} --repo_id user/tuned --shape full" in run.stdout
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
    # The base is a folder: a projector-only push could not work, and is refused before the first step.
    other = tmp_path / "other"
    run = forks.run(*arguments, str(other), "--hub_shape", "projector", HF_TOKEN=WRITER, ACCELERATE_USE_CPU="true")
    assert run.returncode != 0
    assert "choose --shape full" in run.stderr + run.stdout
    assert not list(other.glob("step-*"))


# ---- the card


def card_of(run: Finished, **changes: Any) -> tuple[dict[str, Any], str]:
    from dataclasses import replace

    from shortzip.train.publish.model_card import read_run

    record = replace(read_run(run.folder), **changes)
    text = write_card(record, repo_id="user/tuned", shape="full", size=5_000_000, picture=True)
    _, metadata, body = text.split("---\n", 2)
    return yaml.safe_load(metadata), body


def test_the_card_comes_from_the_runs_records(finished: Finished) -> None:
    metadata, body = card_of(finished)
    evaluation = json.loads((finished.folder / "evaluation.json").read_text())
    tuned = evaluation["rows"][2]
    assert tuned["name"] == "reduced + tuned"
    assert metadata["license"] == "llama2"
    assert metadata["pipeline_tag"] == "image-text-to-text"
    assert {"llava", "visionzip", "shortv"} <= set(metadata["tags"])
    assert "base_model" not in metadata, "a folder's name is nothing that the Hub could link to"
    metrics = metadata["model-index"][0]["results"][0]["metrics"]
    assert {metric["type"]: metric["value"] for metric in metrics} == {
        "exact_match": round(tuned["exact_match"], 6),
        "loss": round(tuned["loss"], 6),
    }
    for row in evaluation["rows"]:
        assert f"| {row['name']} | {row['exact_match']:.1%} | {row['loss']:.4f} | {row['visual_tokens']:g} |" in body
    assert evaluation["machine"] in body
    assert "6 of 36 visual tokens per image (4 dominant, CLS counted among them, and 2 contextual)" in body
    assert "2 of 4 (layers 1, 3)" in body
    assert "100% of instructions.json" in body
    assert "5.0 MB" in body
    assert "tuning: 3 steps, 18 conversations" in body
    assert "![kept tokens](kept_tokens.png)" in body
    assert "stand under its licence: llama2" in body
    assert "image features and image tokens do not match" in body
    assert "## Lineage" not in body
    command = body.split("```bash\n")[1].split("\n```")[0]
    assert "--visionzip.dominant 4" in command
    assert "--data.instructions instructions.json" in command
    assert "output_dir" not in command
    assert str(finished.folder.parent) not in body


def test_the_cards_command_repeats_the_run(finished: Finished, tmp_path: Path) -> None:
    """Its options, given to the loop's own parser, give the run's settings back."""
    import shlex

    from shortzip.train.settings.command_line import load_config

    config = yaml.safe_load((finished.folder / "config.yaml").read_text())
    relative = {**config, "model": "m", "data": {**config["data"], "instructions": "i", "eval_instructions": "e"}}
    options = shlex.split(command_of(relative).replace("\\\n", ""))[3:]
    empty = tmp_path / "empty.yaml"
    empty.write_text("model: m")
    found = load_config(["--config", str(empty), *options])
    kept = tmp_path / "kept.yaml"
    kept.write_text(yaml.safe_dump(relative))
    wanted = load_config(["--config", str(kept)])
    assert found.shaping_settings() == wanted.shaping_settings()
    assert found.data == wanted.data


def test_the_card_names_the_source_of_a_subset(finished: Finished, tiny_instructions: Path, tmp_path: Path) -> None:
    options = SubsetOptions(str(tiny_instructions), tmp_path, tiny_instructions.parent, fraction=0.5, seed=3)
    rows = prepare_subset(options, lambda *_: None)["written"]
    config = yaml.safe_load((finished.folder / "config.yaml").read_text())
    config["data"] = {**config["data"], "instructions": str(tmp_path / "subset.json"), "fraction": 1.0}
    _, body = card_of(finished, config=config)
    assert f"- data: {rows} rows, 50% of instructions.json (prepare_subset, seed 3)" in body


def test_a_card_without_evaluation_or_licence_says_so(finished: Finished) -> None:
    metadata, body = card_of(finished, evaluation=None, licence=None, metrics=[])
    assert metadata["license"] == "unknown"
    assert "model-index" not in metadata
    assert "This run was not evaluated on held-out conversations" in body
    assert "whose card names no licence: ask its authors" in body


def test_licences(tmp_path: Path) -> None:
    assert licence_of(tmp_path) is None
    (tmp_path / "README.md").write_text("# no metadata")
    assert licence_of(tmp_path) is None
    (tmp_path / "README.md").write_text(LICENCE)
    assert licence_of(tmp_path) == "llama2"


@pytest.mark.parametrize(
    ("repo_id", "said"),
    [("tuned", "needed is user/name"), ("a/b/c", "is no name of a repository"), ("user/a b", "is no name of a")],
)
def test_names_that_no_repository_bears(repo_id: str, said: str) -> None:
    with pytest.raises(PublishError, match=said):
        check_repo_id(repo_id, "full")


def test_a_folder_that_is_no_run(hub: Hub, publish: Publish, finished: Finished, tmp_path: Path) -> None:
    run = publish(str(finished.release), "--repo_id", "user/tuned")
    assert "is no run's folder (no config.yaml): name the output_dir of a run" in run.stderr
    folder = tmp_path / "unfinished"
    shutil.copytree(finished.folder, folder, ignore=shutil.ignore_patterns("final"))
    run = publish(str(folder), "--repo_id", "user/tuned")
    assert "has not finished (no final/): continue it with --resume_from_checkpoint latest" in run.stderr
