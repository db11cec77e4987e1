"""Which files of a checkpoint are published, and that none of them, nor the card, holds a secret."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import shortzip.reduction
from shortzip.data.errors import UserError
from shortzip.reduction.base_release import PROJECTOR_FILE
from shortzip.train.release.convert import ORIGINAL_CONFIG_FILE
from shortzip.train.release.lineage import RECORD
from shortzip.train.release.writing import LINEAGE_FILE
from shortzip.train.step.adapters import ADAPTER_FOLDER

# Whatever else lies in a checkpoint's folder was put there by somebody, for another purpose.
_KNOWN = {
    "config.json", "generation_config.json", ORIGINAL_CONFIG_FILE, LINEAGE_FILE,
    "model.safetensors", "model.safetensors.index.json", PROJECTOR_FILE, "mm_projector.bin",
    "processor_config.json", "preprocessor_config.json", "image_processor_config.json", "chat_template.jinja",
    "chat_template.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
}  # fmt: skip
_NUMBERED = re.compile(r"model-\d{5}-of-\d{5}\.safetensors|additional_chat_templates/[A-Za-z0-9_-]+\.jinja")
_NOT_FOR_OTHERS = {"README.md", RECORD}  # the card is written anew; the record names what is on this machine

_BEFORE, _AFTER = rb"(?<![A-Za-z0-9])", rb"(?![A-Za-z0-9])"
_HEX_KEY = rb"(?<!at )(?<!revision\": \")(?<![0-9a-f])[0-9a-f]{40}(?![0-9a-f])"  # not the commit of a lineage
SECRETS: Mapping[str, re.Pattern[bytes]] = {
    "a token of the Hub": re.compile(
        _BEFORE + rb"(hf_[A-Za-z0-9]{16,}|hf_(oauth|jwt|app|org|pat)_[A-Za-z0-9._-]{16,}|api_org_\w{16,})"
    ),
    "an OpenAI or Anthropic key": re.compile(_BEFORE + rb"sk-[A-Za-z0-9_-]{20,}"),
    "a Weights & Biases key": re.compile(
        rb"(?is)(wandb|w&b|weights.{1,3}biases).{0,120}?" + _HEX_KEY + rb"|" + _HEX_KEY + rb".{0,120}?wandb"
        rb"|wandb_v\d_[a-z0-9_]{20,}"
    ),
    "a GitHub token": re.compile(_BEFORE + rb"(gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{22,})"),
    "a GitLab token": re.compile(_BEFORE + rb"gl(pat|ptt|dt|rt)-[A-Za-z0-9_-]{20,}"),
    "an AWS key": re.compile(
        _BEFORE
        + rb"(AKIA|ASIA|ABIA|ACCA)[0-9A-Z]{16}"
        + _AFTER
        + rb"|(?i:aws_?secret\w{0,20})[\"']?\s{0,4}[:=]\s{0,4}[\"']?[A-Za-z0-9/+]{40}"
    ),
    "a Google key": re.compile(
        _BEFORE + rb"(AIza[A-Za-z0-9_-]{35}|ya29\.[A-Za-z0-9_-]{20,}|GOCSPX-[A-Za-z0-9_-]{20,})"
    ),
    "an Azure key": re.compile(rb"AccountKey=[A-Za-z0-9+/=]{40,}"),
    "a Slack token": re.compile(_BEFORE + rb"xox[abeoprs]-[A-Za-z0-9-]{10,}"),
    "a Stripe key": re.compile(_BEFORE + rb"[rs]k_(live|test)_[A-Za-z0-9]{16,}"),
    "a package registry's token": re.compile(_BEFORE + rb"(npm_[A-Za-z0-9]{36}|pypi-[A-Za-z0-9_-]{40,})"),
    "a key of an API": re.compile(_BEFORE + rb"(gsk_|r8_|pplx-|xai-|nvapi-|co_)[A-Za-z0-9_-]{30,}"),
    "a web token": re.compile(_BEFORE + rb"eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}"),
    "a private key": re.compile(rb"-----BEGIN ([A-Z0-9]+ )*PRIVATE KEY( BLOCK)?-----"),
    "a password in an address": re.compile(
        rb"(?i)[a-z][a-z0-9+.-]{1,20}://[^\s/:@\"'<>]{1,80}:[^\s/:@\"'<>]{3,200}@[a-z0-9]"
    ),
    "a password or key": re.compile(
        rb"(?i)(api_?key|secret_?key|access_?token|auth_?token|client_?secret|passw(or)?d)[\"']?\s{0,4}[:=]\s{0,4}"
        rb"[\"']?(?=[a-z0-9_/+.-]*[0-9])[a-z0-9_/+.-]{12,}"
    ),
}
_HEADER_LIMIT = 1 << 24


def published_files(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """The files of a checkpoint's folder that are published, by their path in the repository; and what is left out.

    Raises UserError where one of them is a link, whose target may be anything.
    """
    code = {path.name for path in Path(shortzip.reduction.__file__).parent.glob("*.py")}
    files: dict[str, Path] = {}
    left_out: list[str] = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() and not path.is_symlink():
            continue
        if name in _NOT_FOR_OTHERS or name.startswith(f"{ADAPTER_FOLDER}/"):
            continue
        if name not in _KNOWN and name not in code and not _NUMBERED.fullmatch(name):
            left_out.append(name)
        elif path.is_symlink() or not path.is_file():
            raise UserError(
                f"{path} is {'a link' if path.is_symlink() else 'no file'}: only files of the checkpoint itself are "
                "published. Put the file itself in its place"
            )
        else:
            files[name] = path
    return files, left_out


def refuse_secrets(files: Mapping[str, Path], card: str, token: str | None) -> None:
    """Raises UserError when a key, a token or a password stands in the card or in a file; it is not repeated."""
    contents = {"README.md": card.encode()}
    for name, path in files.items():
        contents[name] = _text_of(path)
    for name, content in contents.items():
        if token and token.encode() in content:
            raise UserError(f"{name} holds a token of the Hub: take it out, and revoke that token")
        for kind, pattern in SECRETS.items():
            match = pattern.search(content)
            if match is not None:
                line = content.count(b"\n", 0, match.start()) + 1
                noun = kind.rsplit(" ", 1)[-1]
                raise UserError(f"{name} holds {kind} (line {line}): take it out, and revoke that {noun}")


def _text_of(path: Path) -> bytes:
    """What of a file can be text: of weights, the header."""
    if path.suffix == ".safetensors":
        with path.open("rb") as file:
            return file.read(min(int.from_bytes(file.read(8), "little"), _HEADER_LIMIT))
    return b"" if path.suffix == ".bin" else path.read_bytes()
