"""What leaves this machine when a run is published: a checkpoint's own files, no secret, and others' text as text."""

import json
import os
import shutil
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from finished_runs import finish, with_lineage, with_setting

from shortzip.data.errors import UserError
from shortzip.data.files import scratch_folder
from shortzip.reduction.reductions import Reductions
from shortzip.train.publish.card_text import fenced, inline, licence_id
from shortzip.train.publish.model_card import licence_of
from shortzip.train.publish.published_files import published_files, refuse_secrets
from shortzip.train.publish.push import prepare


@pytest.fixture(scope="module")
def finished(tiny_release: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finish(tmp_path_factory.mktemp("finished") / "run", tiny_release, Reductions.parse("5+3", "1"))


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def prepared(run: Path) -> tuple[set[str], str, str]:
    """Names of the files, the card, and what was said."""
    said: list[str] = []
    with prepare(run, "user/tuned", "full", say=said.append) as publication:
        return set(publication.files), publication.card, "\n".join(said)


def test_only_the_checkpoints_own_files_are_published(run: Path, tmp_path: Path) -> None:
    whole, _, said = prepared(run)
    assert said == ""
    assert {"config.json", "model.safetensors", "tokenizer.json", "modeling_reduced_llava.py", "lineage.json"} <= whole
    final = run / "final"
    outside = tmp_path / "secret.txt"
    outside.write_text("mine")
    for name in (".env", ".netrc", "notes.txt", "train.jsonl", "model-copy.safetensors", "sub/config.json", "__x.py"):
        (final / name).parent.mkdir(exist_ok=True)
        (final / name).write_text("mine")
    (final / "linked.json").symlink_to(outside)
    (final / "folder").symlink_to(tmp_path)
    (run / "pictures").mkdir()
    (run / "pictures" / "a-holiday.png").write_text("mine")
    names, _, said = prepared(run)
    assert names == whole
    for name in (".env", ".netrc", "notes.txt", "sub/config.json", "linked.json", "folder"):
        assert name in said
    (run / "pictures" / "held-out.png").symlink_to(outside)
    assert prepared(run)[0] == whole, "a picture's link"


@pytest.mark.parametrize("name", ["vocab.txt", "model.safetensors"])
def test_a_link_in_a_files_place_is_refused(run: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    outside.write_text("mine")
    (run / "final" / name).unlink(missing_ok=True)
    (run / "final" / name).symlink_to(outside)
    with pytest.raises(UserError, match=rf"{name} is a link: only files of the checkpoint itself are published"):
        published_files(run / "final")


def test_a_checkpoint_that_lies_on_another_disk_is_published(run: Path, tmp_path: Path) -> None:
    names = prepared(run)[0]
    (run / "final").rename(tmp_path / "elsewhere")
    (run / "final").symlink_to(tmp_path / "elsewhere")
    assert prepared(run)[0] == names


SECRETS = {
    "hub": "hf_" + "aB3" * 11,
    "oauth": "hf_oauth_eyJhbGciOi.J9-payload_x1.signature",
    "openai": "OPENAI_KEY: sk-proj-" + "Ab1_" * 8,
    "anthropic": "sk-ant-api03-" + "Zz9-" * 8,
    "wandb": "WANDB_API_KEY=" + "0a1b2c3d4e" * 4,
    "netrc": "machine api.wandb.ai\n  login user\n  password " + "f0e1d2c3b4" * 4,
    "aws": "aws_access_key_id = AKIA" + "Q7" * 8,
    "aws secret": "AWS_SECRET_ACCESS_KEY=" + "aB/4+" * 8,
    "github": "ghp_" + "k3" * 18,
    "fine-grained": "github_pat_" + "11AB" * 10,
    "google": "AIza" + "S-y4_" * 7,
    "slack": "xoxb-12345-67890-abcdef",
    "ssh": "-----BEGIN OPENSSH PRIVATE KEY-----\nabc",
    "rsa": "-----BEGIN RSA PRIVATE KEY-----",
    "address": "https://bob:correct-horse@host.example/x.git",
    "jwt": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abcdefghijkl",
    "password": "db_password: 'tr0ub4dor-and-3'",
}


@pytest.mark.parametrize("kind", SECRETS)
def test_secrets_are_found_wherever_they_stand(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({"a": 1}) + "\n# " + SECRETS[kind] + "\n")
    with pytest.raises(
        UserError, match=r"tokenizer_config.json holds .* \(line 2\): take it out, and revoke"
    ) as error:
        refuse_secrets({"tokenizer_config.json": path}, "", None)
    assert SECRETS[kind][-12:] not in str(error.value)
    with pytest.raises(UserError, match=r"README.md holds"):
        refuse_secrets({}, f"# card\n\n{SECRETS[kind]}\n", None)


def test_a_secret_in_the_header_of_weights_and_the_users_own_token(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    path = tmp_path / "model.safetensors"
    save_file({"w": torch.zeros(2)}, path, {"made_with": SECRETS["github"]})
    with pytest.raises(UserError, match=r"model.safetensors holds a GitHub token"):
        refuse_secrets({path.name: path}, "", None)
    with pytest.raises(UserError, match=r"README.md holds a token of the Hub"):
        refuse_secrets({}, "a card with odd-token in it", "odd-token")


def test_what_is_no_secret_passes(run: Path) -> None:
    """Commits of 40 hexadecimal digits, also beside a name of wandb; a run's own files."""
    with_lineage(run, name="wandb/llava", revision="0a1b2c3d4e" * 4)
    names, card, _ = prepared(run)
    assert "wandb/llava at 0a1b2c3d4e" in card
    assert "lineage.json" in names


def test_a_dry_run_finds_secrets_too(run: Path) -> None:
    with_setting(run, run_name="sk-" + "a1" * 20)
    assert prepared(run), "the name of a run is not published"
    with_setting(run, cpu_threads="sk-" + "a1" * 20)
    with pytest.raises(UserError, match=r"README.md holds an OpenAI or Anthropic key"):
        prepared(run)


# ---- others' text in the card

HOSTILE = [
    "<script>alert(1)</script>",
    "x\n\n# A heading\n\nand text",
    "[click](https://evil.example)",
    "![](https://evil.example/track.gif)",
    "see https://evil.example or www.evil.example",
    "a`b` <img src=//evil.example/x>",
    "```\n<b>out of the fence</b>\n```",
    "| a | table |",
    "\u202egnp.exe",
    "\x1b[31mred",
    "- x\r\n---\r\nlicense: mit",
]


def rendered(card: str) -> str:
    """What is left of a card when its metadata and its code are taken out: what Markdown would read as such."""
    import re

    body = card.split("\n---\n", 1)[1]
    body = re.sub(r"^(`{3,})[a-z]*\n.*?\n\1$", "", body, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "", body)


@pytest.mark.parametrize("text", HOSTILE)
def test_others_text_stands_in_the_card_as_text(run: Path, tmp_path: Path, text: str) -> None:
    plain = rendered(prepared(run)[1])
    with_lineage(run, name=text, revision=text)
    older = json.loads((run / "final" / "lineage.json").read_text())
    (run / "final" / "lineage.json").write_text(json.dumps([*older, *older]))
    data = {
        **yaml.safe_load((run / "config.yaml").read_text())["data"],
        "instructions": text,
        "eval_instructions": text,
    }
    release = shutil.copytree(yaml.safe_load((run / "config.yaml").read_text())["model"], tmp_path / "base")
    (release / "README.md").write_text(f"---\n{yaml.safe_dump({'license': text})}\n---\n")
    with_setting(run, data=data, model=str(release), lora_r=16)
    row: dict[str, Any] = {
        "name": f"{text} + tuned", "exact_match": 0.5, "loss": 1.0, "visual_tokens": 8, "frozen_layers": 1,
        "llm_flops": 1, "prefill_ms": 1.0, "questions": 3, "prefill_batch": 1,
    }  # fmt: skip
    (run / "evaluation.json").write_text(json.dumps({"rows": [row], "machine": text}))
    card = prepared(run)[1]
    metadata = yaml.safe_load(card.split("\n---\n", 1)[0].removeprefix("---\n"))
    assert metadata["license"] == "other"
    assert "base_model" not in metadata
    assert all(letter.isprintable() or letter == "\n" for letter in card)
    found = rendered(card)
    for sign in ("<", "](", "https://evil", "www.", "\x1b", "\u202e", "\r"):
        assert found.count(sign) == plain.count(sign), sign
    headings = [line for line in found.splitlines() if line.startswith("#")]
    others = {"## Lineage"}
    assert [h for h in headings if h not in others] == [h for h in plain.splitlines() if h.startswith("#")]
    assert all(line.count("|") - line.count("\\|") == 8 for line in card.splitlines() if line.startswith("| "))


def test_names_without_meaning_to_markdown_stay_as_they_are() -> None:
    for name in (
        "tiny-llava",
        "maker/llava-v1.5-7b",
        "reduced, untuned",
        "all tokens + tuned",
        "a_b 60%",
        "drawn scenes (held out)",
    ):
        assert inline(name) == name
    assert inline("a" * 500) == "a" * 119 + "…" or inline("a" * 500) == "`" + "a" * 119 + "…`"
    assert inline("") == "(no name)"
    assert fenced("bash", "a ```` b").startswith("`````bash\n")
    assert [licence_id(x) for x in (None, "apache-2.0", "LLAMA 2 Community")] == ["unknown", "apache-2.0", "other"]


def test_the_command_for_llavas_own_code_runs_nothing_of_a_name(run: Path) -> None:
    from shortzip.train.publish.model_card import loading_lines, read_run

    with_lineage(run, name="a b; rm -rf ~")
    assert "--model-base 'a b; rm -rf ~' --image-file" in loading_lines("user/llava-x", "llava", read_run(run))
    with (
        pytest.raises(UserError, match="base 'a b; rm -rf ~' is no name of a repository"),
        prepare(run, "user/llava-x", "llava", base="a b; rm -rf ~"),
    ):
        pass


@pytest.fixture(scope="module")
def with_others_code(tiny_release: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release whose configs name classes of another repository, and of a file that it does not come with."""
    folder = shutil.copytree(tiny_release, tmp_path_factory.mktemp("named") / "release")
    for name, key in (("tokenizer_config", "AutoTokenizer"), ("processor_config", "AutoProcessor")):
        path = folder / f"{name}.json"
        config = json.loads(path.read_text())
        config["auto_map"] = {key: ["evil/repo--code.Class", None]}
        if "image_processor" in config:
            config["image_processor"]["auto_map"] = {"AutoImageProcessor": "elsewhere.Class"}
        path.write_text(json.dumps(config))
    config = json.loads((folder / "config.json").read_text())
    for part in (config, config["text_config"], config["vision_config"]):
        part["auto_map"] = {"AutoConfig": "evil/repo--code.Class"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_others_code_is_not_handed_on(with_others_code: Path, tmp_path: Path) -> None:
    """Who loads a published checkpoint trusts the code in it: it names no other."""
    final = finish(tmp_path / "run", with_others_code, Reductions.parse("5+3")) / "final"
    for path in final.glob("*.json"):
        assert "evil" not in path.read_text(), path
        assert "elsewhere" not in path.read_text(), path
    own = json.loads((final / "config.json").read_text())["auto_map"]
    assert own["AutoModelForImageTextToText"] == "modeling_reduced_llava.ReducedLlavaForConditionalGeneration"
    assert (
        "ReducedLlavaProcessor"
        in json.loads((final / "processor_config.json").read_text())["auto_map"]["AutoProcessor"]
    )


def test_a_checkpoint_that_names_others_code_is_not_published(run: Path) -> None:
    path = run / "final" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": {"AutoTokenizer": ["evil/x--y.Z", None]}}))
    with pytest.raises(UserError, match=r"tokenizer_config.json: its auto_map names code that is not in this folder"):
        prepared(run)


def test_a_damaged_record_is_refused_in_words(run: Path) -> None:
    (run / "final" / "tuned_with.json").write_text("[]")
    with pytest.raises(UserError, match=r"tuned_with.json holds a list"):
        prepared(run)


@pytest.mark.parametrize(
    ("lineage", "message"),
    [
        ("{", "not readable as JSON"),
        ("[" * 100_000, "not readable as JSON"),
        ('{"name": "x", "revision": null}', "must be a list"),
        ('[{"name": "x"}]', "must be a list"),
        ('["x"]', r"must be a list of \{name, revision"),
        ('[{"name": 3, "revision": null}]', "must be a list"),
        ('[{"name": "x", "revision": null, "fastv": {"layer": 0, "keep": 1}}]', "lineage of 'x': fastv must be"),
    ],
)
def test_a_lineage_that_others_damaged(run: Path, lineage: str, message: str) -> None:
    (run / "final" / "lineage.json").write_text(lineage)
    with pytest.raises(UserError, match=f"lineage.json.*{message}"):
        prepared(run)


@pytest.mark.parametrize("readme", [b"---\nlicense: [\n---\n", b"---\nlicense: \xff\n---\n", b"---\n- a\n---\n"])
def test_a_base_card_that_cannot_be_read_names_no_licence(tmp_path: Path, readme: bytes) -> None:
    (tmp_path / "README.md").write_bytes(readme)
    assert licence_of(tmp_path) in (None, "\ufffd")
    assert licence_id(licence_of(tmp_path)) in ("unknown", "other")


# ---- scratch


def test_what_a_killed_push_left_is_swept_by_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    child = os.fork()
    if child == 0:
        with scratch_folder("shortzip-publish") as folder:
            (folder / "half").touch()
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    (left,) = tmp_path.iterdir()
    assert (left / "half").is_file()
    with scratch_folder("shortzip-publish") as mine, scratch_folder("shortzip-publish") as beside:
        assert not left.exists()
        assert mine.is_dir(), "whose owner lives is not swept"
        assert beside.is_dir()
    assert not list(tmp_path.iterdir())
