"""What a run depends on, recognised by content: a run continues with the very things that it began with.

Every part has a digest of its own in state.json, so that a refusal can name what has changed. Folders may move, Hub
ids become folders, weights be cut into other shards: that changes nothing. Files are read as they lie on the disk, not
as the installed libraries read them: another version of a library is no other release (`changed_versions` tells it).

Of a tensor and of an image so much is read that another one is told from it, not all: seconds for 66 000 images.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from shortzip.data.batching import permutation
from shortzip.data.dataset import ConversationDataset
from shortzip.data.files import read_json, sampled_digest
from shortzip.data.images import ImageSource, image_bytes, image_name, resolve_image_path
from shortzip.data.videos import VideoSource, frame_paths, video_name
from shortzip.reduction.base_release import fetch_base
from shortzip.reduction.families import family_of
from shortzip.train.release.opening import Release, release_projector
from shortzip.train.release.tensor_files import open_tensors, weight_files
from shortzip.train.run.checkpoint import CheckpointError, versions
from shortzip.train.run.run_folder import read_status

FORMAT = 1  # to be raised when the same parts give another result than before
IMAGES, VIDEOS, IMAGE_DIGITS = "the images", "the videos", 8
READERS = 16  # threads: on a network disk an image is mostly waited for
_SAMPLE = 4096  # bytes read at each of three places of a tensor
_SMALL = 1 << 16  # bytes of a tensor that is read whole: biases, norms
# What a library writes into a release's JSON, and what another part holds.
_INCIDENTAL = {
    "transformers_version", "_name_or_path", "name_or_path", "_commit_hash", "architectures", "auto_map", "dtype",
    "torch_dtype", "processor_class", "chat_template",
}  # fmt: skip
# Settings of the run, and where weights lie.
_REDUCTIONS = {"visionzip", "shortv", "fastv", "positions", "budgets", "base_release"}
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


def run_identity(release: Release, dataset: ConversationDataset) -> dict[str, str]:
    """The digest of each part that a run's result depends on, beside its settings.

    Raises as reading a release does.
    """
    return {"ShortZip's own format": str(FORMAT), **release_identity(release), **data_identity(dataset)}


def data_identity(dataset: ConversationDataset) -> dict[str, str]:
    """The digests of what is trained on: every turn, the images' names and content, the prompt's template.

    That of the images holds IMAGE_DIGITS of each one of `images_of`, so that those that have changed can be named;
    that of the videos likewise, where there are any, with what decides which of their frames are seen.
    """
    turns, names = hashlib.sha256(), hashlib.sha256()
    for conversation in dataset.conversations:
        turns.update(_json([conversation.id, conversation.turns]))
        names.update(_json([image_name(source) for source in conversation.images]))
    sources = images_of(dataset)
    parts = [sources[start : start + 256] for start in range(0, len(sources), 256)]
    with ThreadPoolExecutor(READERS) as readers:
        content = readers.map(lambda part: "".join(_image_digest(source, dataset) for source in part), parts)
        images = "".join(content)
    return {
        "the turns of the conversations": _short(turns),
        "the names of the images": _short(names),
        IMAGES: images,
        **_videos_identity(dataset),
        "the chat template": _short(hashlib.sha256(_json(dataset.supervision.template))),
    }


def _videos_identity(dataset: ConversationDataset) -> dict[str, str]:
    videos, sampling = videos_of(dataset), dataset.supervision.sampling
    if not videos or sampling is None:
        return {}
    names = [[video_name(source) for source in conversation.videos] for conversation in dataset.conversations]
    with ThreadPoolExecutor(READERS) as readers:
        content = "".join(readers.map(lambda source: _video_digest(source, dataset), videos))
    return {
        "the names of the videos": _short(hashlib.sha256(_json(names))),
        VIDEOS: content,
        "which frames of videos are seen": _short(hashlib.sha256(_json(asdict(sampling)))),
    }


def videos_of(dataset: ConversationDataset) -> list[VideoSource]:
    """Every video of the conversations once, in order."""
    return list(dict.fromkeys(source for conversation in dataset.conversations for source in conversation.videos))


def images_of(dataset: ConversationDataset) -> list[ImageSource]:
    """Every image of the conversations once, in order."""
    return list(dict.fromkeys(source for conversation in dataset.conversations for source in conversation.images))


def release_identity(release: Release) -> dict[str, str]:
    """The digests of a release: weights, configs, tokenizer, image processor. Raises as reading it does."""
    folder, config = release.folder, release.config
    weights = folder if weight_files(folder) else fetch_base(config.get("base_release"), release.name)
    layer = {key: config.get(key) for key in ("vision_feature_layer", "vision_feature_select_strategy")}
    parts = ("text_config", "vision_config", *layer)
    rest = {key: value for key, value in config.items() if key not in {*parts, *_REDUCTIONS}}
    projector = {name: tensor.float() for name, tensor in release_projector(release).items()}
    generation = folder / "generation_config.json"
    return {
        **_weights_identity(weights, family_of(config["model_type"]).towers),
        "the projector to begin with": _short(_tensors_digest(projector, _whole)),
        "the language model's config": _short(hashlib.sha256(_json(_plain(config.get("text_config"))))),
        "the vision tower's config": _short(hashlib.sha256(_json(_plain(config.get("vision_config"))))),
        "the feature layer": _short(hashlib.sha256(_json(layer))),
        "the rest of the release's config": _short(hashlib.sha256(_json(_plain(rest)))),
        "the image processor": _short(_files_digest(folder, _PROCESSOR_FILES)),
        "the tokenizer": _short(_files_digest(folder, _TOKENIZER_FILES)),
        "the generation config": _short(_files_digest(generation.parent, [generation.name])),
    }


def check_same_origin(
    state: Mapping[str, Any],
    identity: Mapping[str, str],
    dataset: ConversationDataset,
    path: Path,
    say: Callable[[str], None],
) -> None:
    """Raises `CheckpointError` naming each part of `identity` that is another than in a checkpoint's state.

    Images and videos that no step has seen may have been mended, if it was a bad one that the run failed over. That,
    parts that an older ShortZip did not note, and libraries of other versions are said. `path`: of the run.
    """
    saved = state.get("identity", {})
    changed = {part: part for part, digest in identity.items() if saved.get(part, digest) != digest}
    of_kinds: tuple[tuple[str, list[Any], Callable[[Any], str]], ...] = (
        (IMAGES, images_of(dataset), image_name),
        (VIDEOS, videos_of(dataset), video_name),
    )
    for part, sources, name_of in of_kinds:
        if part not in changed:
            continue
        then = len(saved[part]) // IMAGE_DIGITS
        changed[part] = f"{part} ({then} then, {len(sources)} now)"
        if then == len(sources):
            digests = zip(sources, _digests(saved[part]), _digests(identity[part]), strict=True)
            others = [source for source, before, now in digests if before != now]
            name = name_of(others[0])
            changed[part] = f"{part} ({len(others)} of {len(sources)}, such as {name})"
            if "BadSample" in read_status(path)["reason"] and not set(others) & _seen(state, dataset):
                what = part.removeprefix("the ")
                say(f"{len(others)} {what} that no step has seen were mended since the run failed, such as {name}")
                del changed[part]
    if changed:
        raise CheckpointError(
            f"{path} began with something else. Changed since: {', '.join(changed.values())}. Put back what it began "
            "with, or start another run in another output_dir"
        )
    unknown = [part for part in identity if part not in saved]
    if unknown:
        names = ", ".join(unknown)
        say(f"{path} was begun by an older ShortZip: whether these have changed cannot be checked: {names}")
    versions_said = changed_versions(state["versions"], versions())
    if versions_said is not None:
        say(versions_said)


def _digests(digits: str) -> list[str]:
    return [digits[start : start + IMAGE_DIGITS] for start in range(0, len(digits), IMAGE_DIGITS)]


def _seen(state: Mapping[str, Any], dataset: ConversationDataset) -> set[ImageSource | VideoSource]:
    """The images and videos of the rows that a checkpoint's steps have seen."""
    order = permutation(len(dataset), state["settings"]["seed"], 0)[: state["run"]["samples_seen"]]
    rows = [dataset.conversations[row] for row in order.tolist()]
    return {source for row in rows for source in (*row.images, *row.videos)}


def changed_versions(saved: Mapping[str, str], installed: Mapping[str, str]) -> str | None:
    """Which libraries are of another version than when a checkpoint was written, in words; None if none is."""
    changed = [name for name in installed if saved.get(name, installed[name]) != installed[name]]
    if not changed:
        return None
    words = ", ".join(f"{name} was {saved[name]} and is {installed[name]}" for name in changed)
    return f"other library versions than when the checkpoint was written: {words}. Last digits may differ from here on"


def _weights_identity(folder: Path, towers: tuple[str, ...]) -> dict[str, str]:
    """Digests of the untrained weights by part, however they are cut into files. `towers`: their names in weights."""
    digests: dict[str, dict[str, str]] = {"the language model's weights": {}, "the vision tower's weights": {}}
    for path in weight_files(folder):
        with open_tensors(path) as tensors:
            for name in tensors:
                if "multi_modal_projector." in name:
                    continue
                of_tower = any(f"{tower}." in name for tower in towers)
                part = "the vision tower's weights" if of_tower else "the language model's weights"
                digests[part][name] = _tensors_digest({name: tensors[name]}, _sample).hexdigest()
    return {part: _short(hashlib.sha256(_json(sorted(by_file.items())))) for part, by_file in digests.items()}


def _tensors_digest(tensors: Mapping[str, torch.Tensor], content: Callable[[torch.Tensor], Iterable[bytes]]) -> Any:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(_json([name, str(tensor.dtype), list(tensor.shape)]))
        for piece in content(tensor):
            digest.update(piece)
    return digest


def _whole(tensor: torch.Tensor) -> list[bytes]:
    return [tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()]


def _sample(tensor: torch.Tensor) -> list[bytes]:
    """The bytes of a small tensor; of a large one, those at its beginning, middle and end."""
    if not tensor.numel():
        return []
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)  # a view: nothing is read yet
    if len(flat) <= _SMALL:
        return [flat.numpy().tobytes()]
    starts = (0, (len(flat) - _SAMPLE) // 2, len(flat) - _SAMPLE)
    return [flat[start : start + _SAMPLE].numpy().tobytes() for start in starts]


def _image_digest(source: ImageSource, dataset: ConversationDataset) -> str:
    """IMAGE_DIGITS of a file, by parts, or of an embedded image, whole; dashes where it cannot be read."""
    try:
        digest: str = dataset.known_images.get("sampled digest", source, dataset.image_root, _sampled)
    except (OSError, ValueError):  # BadImage too
        return "-" * IMAGE_DIGITS
    return digest[:IMAGE_DIGITS]


def _sampled(source: ImageSource, image_root: Any) -> str:
    if isinstance(source, str):
        return sampled_digest(resolve_image_path(source, image_root))
    return hashlib.sha256(image_bytes(source)).hexdigest()


def _video_digest(source: VideoSource, dataset: ConversationDataset) -> str:
    """IMAGE_DIGITS of a video's file, or of its frames', by parts; dashes where one cannot be read."""
    try:
        paths = frame_paths(source, dataset.image_root) or (str(source),)
        known, root = dataset.known_images, dataset.image_root
        digests = [known.get("sampled digest", path, root, _sampled) for path in paths]
    except (OSError, ValueError):
        return "-" * IMAGE_DIGITS
    return hashlib.sha256(_json(digests)).hexdigest()[:IMAGE_DIGITS]


def _files_digest(folder: Path, names: Iterable[str]) -> Any:
    """Of small files that are there: JSON by what it says, others by their bytes."""
    digest = hashlib.sha256()
    for name in names:
        path = folder / name
        if path.is_file():
            content = _json(_plain(read_json(path))) if path.suffix == ".json" else path.read_bytes()
            digest.update(name.encode() + b"\0" + content)
    return digest


def _plain(value: Any) -> Any:
    """JSON without what libraries write into it."""
    if isinstance(value, dict):
        return {key: _plain(held) for key, held in value.items() if key not in _INCIDENTAL}
    return [_plain(held) for held in value] if isinstance(value, list) else value


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode() + b"\n"


def _short(digest: Any) -> str:
    return str(digest.hexdigest()[:16])


def fingerprint(dataset: ConversationDataset, projector: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """What a run starts from, by its content: folders and files may move between a run and its continuation."""
    samples = hashlib.sha256(dataset.lengths.tobytes() + dataset.supervised.tobytes())
    for conversation in dataset.conversations:
        samples.update(conversation.id.encode() + b"\0")
    weights = hashlib.sha256()
    for name in sorted(projector):
        weights.update(projector[name].detach().cpu().contiguous().numpy().tobytes())
    return {"content of the samples": samples.hexdigest()[:16], "release's projector": weights.hexdigest()[:16]}
