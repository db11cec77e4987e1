"""Publishing a run's reduced checkpoint on the Hub: files, model card, one commit, a tag.

Everything can be repeated: what is on the Hub already is not sent again, and a push that was cut off or killed is made
whole by the same command. The token is huggingface_hub's own (`hf auth login`); it is never read into a file or a
message here.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import httpx, validate_repo_id

from shortzip.data.errors import UserError
from shortzip.data.files import scratch_folder
from shortzip.train.publish.model_card import PICTURE, RunRecord, loading_lines, read_run, write_card
from shortzip.train.publish.published_files import published_files, refuse_secrets
from shortzip.train.release.foreign_code import refuse_foreign_code
from shortzip.train.release.hub import retrying
from shortzip.train.release.lineage import check_run, check_settings, release_of
from shortzip.train.release.loading import load_processor
from shortzip.train.release.opening import Release, open_release, release_projector
from shortzip.train.release.writing import SHAPES, WHOLE, Shape, describe_base, write_reduced_checkpoint
from shortzip.train.run.run_folder import CONFIG, HELD_OUT_PICTURE, PICTURES
from shortzip.train.settings.command_line import printable
from shortzip.train.settings.config import TuneConfig

_OURS = {".gitattributes"}  # what the Hub itself puts into a new repository


class PublishError(UserError):
    """A checkpoint that cannot be published as asked, with the cure."""


@dataclass(frozen=True)
class Publication:
    """What a push consists of."""

    repo_id: str
    shape: Shape
    files: dict[str, Path]
    """Path in the repository → file on this machine; without the card."""
    card: str
    loading: str
    """The lines that load it: three of transformers, or the commands of LLaVA's own code."""

    @property
    def size(self) -> int:
        """Bytes of all files, the card included."""
        return sum(path.stat().st_size for path in self.files.values()) + len(self.card.encode())


@dataclass(frozen=True)
class PublishedRepo:
    """Where a push went."""

    repo_id: str
    url: str
    commit: str
    tag: str
    loading: str

    def describe(self) -> str:
        """The address and what loads it."""
        return f"{self.url}/tree/{self.tag}  (commit {self.commit})\n{self.loading}"


def check_publishable(config: TuneConfig, release: Release) -> None:
    """Refuses at a run's start what could not be published at its end. Raises PublishError."""
    if not config.push_to_hub:
        return
    assert config.hub_model_id is not None
    check_repo_id(config.hub_model_id, config.hub_shape)
    if get_token() is None:
        raise PublishError("push_to_hub needs a token of the Hub: `hf auth login` with one that may write")
    _check_base_name(config.hub_shape, config.hub_base)
    _check_base(release, config.hub_shape, config.hub_base)


def check_repo_id(repo_id: str, shape: Shape) -> None:
    """Raises PublishError for a name that no repository of this shape can bear."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PublishError(f"repo-id {repo_id!r} is no name of a repository: {error}") from error
    if repo_id.count("/") != 1:
        raise PublishError(f"repo-id {repo_id!r}: needed is user/name")
    if shape == "llava" and "llava" not in repo_id.split("/")[1].lower():
        raise PublishError(
            f"repo-id {repo_id!r}: LLaVA's own loader recognises a LLaVA by its name: let the name contain 'llava'"
        )


def _check_base_name(shape: Shape, base: str | None) -> None:
    if base is None:
        return
    try:
        validate_repo_id(base)
    except HFValidationError as error:
        raise PublishError(f"base {base!r} is no name of a repository on the Hub: {error}") from error
    if shape in WHOLE:
        raise PublishError(f"base {base} is for shapes projector and llava: shape {shape} holds its release's weights")


def _check_base(release: Release, shape: Shape, base: str | None) -> None:
    if shape in WHOLE or base is not None or release.config.get("base_release"):
        return
    if shape == "projector" and release.revision is not None and not release.converted:
        return
    if shape == "llava" and release.revision is not None and release.original_config is not None:
        return
    why = (
        f"{release.name} is in LLaVA's own layout, which transformers cannot fetch"
        if release.revision is not None and release.converted
        else f"{release.name} is not on the Hub"
        if release.revision is None
        else f"{release.name} is no release that LLaVA's own code loads"
    )
    raise PublishError(
        f"shape {shape} names the release that it belongs to, and {why}: choose --shape full, or name the same "
        "release on the Hub with --base user/name"
    )


@contextmanager
def prepare(
    run: Path,
    repo_id: str,
    shape: Shape,
    *,
    base: str | None = None,
    say: Callable[[str], None] = print,
) -> Iterator[Publication]:
    """The files and the card of a finished run's publication; files that are made for it live as long as the block.

    `base`: for shapes `projector` and `llava`, a Hub id of the release the run used; its files are compared with the
    run's own by the Hub's checksums, without fetching them. Raises PublishError or FileNotFoundError.
    """
    if shape not in SHAPES:
        raise PublishError(f"shape is {shape!r}, known are {', '.join(SHAPES)}")
    check_repo_id(repo_id, shape)
    _check_base_name(shape, base)
    record = read_run(run)
    final = open_release(str(run))
    commit: str | None = None
    check_settings(final.source, record.config, run / CONFIG)
    release = _release_of(record, final, run, shape)
    with scratch_folder("shortzip-publish") as scratch:
        folder = final.source
        if release is not None and shape != "full":
            _check_base(release, shape, base)
            commit = _same_on_hub(release, base, say) if base and shape == "projector" else None
            folder = scratch / repo_id.split("/")[1]
            write_reduced_checkpoint(
                folder,
                release,
                release_projector(final),
                load_processor(final),
                record.reductions,
                shape=shape,
                base=base,
                base_revision=commit,
                vision_tower=record.config.get("vision_tower"),
                budgets=final.saved_budgets,
            )
        files, left_out = published_files(folder)
        refuse_foreign_code(folder)
        if left_out:
            say(f"not published, for they are no files of a checkpoint: {', '.join(map(printable, left_out))}")
        for lost in record.reductions.lost_in_an_engine if shape == "engine" else []:
            say(f"not published: {lost}")
        picture = run / PICTURES / HELD_OUT_PICTURE
        if picture.is_file() and not picture.is_symlink():
            files[PICTURE] = picture
        record = _over(record, base, commit)
        size = sum(path.stat().st_size for path in files.values())
        card = write_card(record, repo_id=repo_id, shape=shape, size=size, picture=PICTURE in files)
        refuse_secrets(files, card, get_token())
        yield Publication(repo_id, shape, files, card, loading_lines(repo_id, shape, record))


def _over(record: RunRecord, base: str | None, commit: str | None) -> RunRecord:
    """The record of the same run over a release's name and commit on the Hub."""
    if base is None or not record.lineage:
        return record
    last = {**record.lineage[-1], "name": base, "revision": commit}
    return replace(record, lineage=[*record.lineage[:-1], last])


def _release_of(record: RunRecord, final: Release, run: Path, shape: Shape) -> Release | None:
    """The release that a run started from; None for shape full where it is not here any more, as nothing asks for it.

    Raises ConfigError when the run's config names another release than the one that `final` was tuned over.
    """
    try:
        release = release_of(final, record.config)
    except FileNotFoundError:
        if shape == "full":
            return None
        raise
    check_run(final, release, run / CONFIG)
    return release


def _same_on_hub(release: Release, base: str, say: Callable[[str], None]) -> str:
    """The commit of `base` on the Hub, whose files are those of `release`. Raises PublishError if one differs."""
    try:
        info = retrying(lambda: HfApi().model_info(base, files_metadata=True), say, f"looking at {base}")
    except RepositoryNotFoundError as error:
        raise PublishError(f"--base {base}: no such repository, or none that this token may see") from error
    except (HfHubHTTPError, httpx.TransportError) as error:
        reason = f"answered {error.response.status_code}" if isinstance(error, HfHubHTTPError) else "cannot be reached"
        raise PublishError(f"--base {base}: the Hub {reason}: try again later, or choose --shape full") from error
    there = {sibling.rfilename: sibling for sibling in info.siblings or []}
    for entry in describe_base(release)["files"]:
        name = entry["file"]
        sibling = there.get(name)
        if sibling is None or sibling.size != entry["size"]:
            difference = "is missing" if sibling is None else f"has {sibling.size} bytes, not {entry['size']}"
            raise PublishError(f"--base {base} is another release than {release.name}: {name} {difference} there")
        local = _checksum(release.folder / name, lfs=sibling.lfs is not None)
        if local != (sibling.lfs.sha256 if sibling.lfs is not None else sibling.blob_id):
            raise PublishError(f"--base {base} is another release than {release.name}: {name} has other content there")
    assert info.sha is not None
    return info.sha


def _checksum(path: Path, *, lfs: bool) -> str:
    """What the Hub knows a file by: SHA-256 with LFS, git's blob id without."""
    if lfs:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def push(
    publication: Publication,
    *,
    private: bool = False,
    update: bool = False,
    tag: str | None = None,
    say: Callable[[str], None] = print,
) -> PublishedRepo:
    """Creates the repository, uploads in one commit, tags it.

    A repository that exists is written to only if it is empty, already holds exactly this publication (a push that was
    cut off), or `update` is given. `tag` defaults to v1, or the next number. Raises PublishError.
    """
    token = get_token()
    if token is None:
        raise PublishError("publishing needs a token of the Hub: `hf auth login` with one that may write")
    api, repo_id = HfApi(), publication.repo_id
    with _explained(repo_id):
        user = retrying(lambda: api.whoami()["name"], say, "asking who this token belongs to")
        try:
            retrying(lambda: api.create_repo(repo_id, private=private), say, f"creating {repo_id}")
            say(f"{repo_id} created as {user}")
        except HfHubHTTPError as error:
            if error.response.status_code != 409:
                raise
            _check_existing(api, publication, update, say)
        _make_visible_as_asked(api, repo_id, private, say)
        commit = retrying(lambda: _commit(api, publication, say), say, f"uploading to {repo_id}")
        name = retrying(lambda: _tag(api, repo_id, commit, tag), say, f"tagging {repo_id}")
    return PublishedRepo(repo_id, f"{api.endpoint}/{repo_id}", commit, name, publication.loading)


def _make_visible_as_asked(api: HfApi, repo_id: str, private: bool, say: Callable[[str], None]) -> None:
    """Refuses to put what should be private into a public repository that was there before."""
    info = retrying(lambda: api.model_info(repo_id), say, f"looking at {repo_id}")
    if private and not info.private:
        raise PublishError(f"{repo_id} exists and is public, but --private is given: make it private on the Hub first")


def _remote_files(api: HfApi, repo_id: str) -> dict[str, str]:
    """Path → checksum (as `_checksum` gives) of what is on the Hub."""
    info = api.model_info(repo_id, files_metadata=True)
    return {
        file.rfilename: file.lfs.sha256 if file.lfs is not None else str(file.blob_id) for file in info.siblings or []
    }


def _check_existing(api: HfApi, publication: Publication, update: bool, say: Callable[[str], None]) -> None:
    repo_id = publication.repo_id
    remote = retrying(lambda: _remote_files(api, repo_id), say, f"looking at {repo_id}")
    others = sorted(remote.keys() - _OURS)
    if not others or update or _is_there(publication, {name: remote[name] for name in others}):
        return
    shown = ", ".join(others[:4]) + (" …" if len(others) > 4 else "")
    raise PublishError(
        f"{repo_id} exists and holds other files ({shown}): give another --repo_id, or --update to put this "
        "checkpoint there as a new commit (the old one stays in its history)"
    )


def _is_there(publication: Publication, remote: Mapping[str, str]) -> bool:
    """Whether a repository holds exactly this: a push was cut off after its one commit."""
    if remote.keys() != {*publication.files, "README.md"}:
        return False
    card = publication.card.encode()
    if remote["README.md"] != hashlib.sha1(b"blob %d\0" % len(card) + card).hexdigest():
        return False
    return all(
        remote[name] == _checksum(path, lfs=len(remote[name]) == 64) for name, path in publication.files.items()
    )


def _commit(api: HfApi, publication: Publication, say: Callable[[str], None]) -> str:
    # create_commit sends nothing twice. upload_folder would want files, picture and card copied into one folder first.
    remote = _remote_files(api, publication.repo_id)
    adding = [
        CommitOperationAdd("README.md", publication.card.encode()),
        *(CommitOperationAdd(name, str(path)) for name, path in publication.files.items()),
    ]
    gone = sorted(remote.keys() - _OURS - {operation.path_in_repo for operation in adding})
    operations: list[CommitOperationAdd | CommitOperationDelete] = [*adding, *map(CommitOperationDelete, gone)]
    say(f"{publication.repo_id}: {len(adding)} files, {publication.size / 1e6:,.1f} MB")
    message = f"Reduced checkpoint ({publication.shape})"
    return str(api.create_commit(publication.repo_id, operations, commit_message=message).oid)


def _tag(api: HfApi, repo_id: str, commit: str, tag: str | None) -> str:
    """The tag of `commit`: one it has already, `tag`, or the next free v1, v2 …"""
    tags = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id).tags}
    for name, target in tags.items():
        if target == commit and tag in (None, name):
            return name
    if tag in tags:
        raise PublishError(f"{repo_id} has a tag {tag} on another commit: give another --tag")
    numbers = [int(match[1]) for name in tags if (match := re.fullmatch(r"v(\d+)", name))]
    name = tag or f"v{max(numbers, default=0) + 1}"
    api.create_tag(repo_id, tag=name, revision=commit)
    return name


@contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """Turns what the Hub refuses into PublishError with the cure; nothing of a request's headers is in it."""
    again = "run the same command again: what was uploaded is not sent twice"
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        reason = error.server_message or error.response.reason_phrase
        if status == 401:
            cure = "the token is missing, expired or mistyped: `hf auth login` with one that may write"
        elif status in (402, 403):
            cure = f"this token may not write to {repo_id.split('/')[0]}: use one that may (hf.co/settings/tokens)"
        elif status == 404:
            cure = "the repository vanished meanwhile, or this token may not see it"
        else:
            cure = again
        raise PublishError(f"{repo_id}: the Hub answered {status} ({reason}): {cure}") from error
    except httpx.TransportError as error:
        raise PublishError(f"{repo_id}: the Hub cannot be reached ({type(error).__name__}): {again}") from error
    except RuntimeError as error:
        if isinstance(error, PublishError) or error.__cause__ is None:
            raise
        raise PublishError(f"{repo_id}: {error} {type(error.__cause__).__name__}: {again}") from error


def summary(publication: Publication) -> str:
    """Every file with its size, and the card: what --dry_run shows."""
    sizes: Mapping[str, int] = {
        "README.md": len(publication.card.encode()),
        **{name: path.stat().st_size for name, path in publication.files.items()},
    }
    lines = [f"{size:>15,}  {name}" for name, size in sorted(sizes.items())]
    return "\n".join([*lines, f"{sum(sizes.values()):>15,}  in all", "", publication.card])


def publish_run(config: TuneConfig, run: Path, say: Callable[[str], None]) -> PublishedRepo:
    """What push_to_hub does at a run's end. Raises PublishError; the run's folder stays as it is."""
    assert config.hub_model_id is not None
    with prepare(run, config.hub_model_id, config.hub_shape, base=config.hub_base, say=say) as publication:
        return push(publication, private=config.hub_private_repo, say=say)
