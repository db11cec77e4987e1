"""Values of a row: its texts, images and videos, each usable or refused in words that name it."""

import json
import re
from typing import Any

from shortzip.data.columns import is_empty
from shortzip.data.data_uris import inline_image, is_address, is_data_uri
from shortzip.data.drops import BadSample
from shortzip.data.hints import SUFFIXES
from shortzip.data.images import EmbeddedImage, ImageSource
from shortzip.data.videos import VideoSource

# What the templates of the field put where a video or sound stands: <video>, <|video_pad|>, <audio_1>.
_MEDIA = re.compile(
    r"(?<!`)(<\|?\s*(?:video|audio|speech|sound)s?"
    r"(?:[_ -]?(?:\d+|pad|placeholder|token|soft_token|here|start))?\s*\|?>)(?!`| tag| element)",
    re.IGNORECASE,
)
_CODE = re.compile(r"(```|~~~).*?(\1|\Z)|(`+)[^`]+\3(?!`)", re.DOTALL)
_LONGEST_PATH = 4096  # bytes: PATH_MAX of Linux


def check_text(text: str, what: str, sample_id: str, source: str) -> None:
    """Half of a surrogate pair, as a cut emoji leaves it in JSON, is no text: neither a tokenizer nor a file takes it.

    Raises:
        BadSample: there is one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start : error.start + 1]
        raise malformed(
            sample_id,
            source,
            f"{what} has {half!r} at character {error.start}, half of a surrogate pair (a cut emoji?)",
        ) from None


def stray_media(role: str, text: str) -> str | None:
    """A placeholder of a video or sound in a text, if there is one.

    Questions about HTML have the same tags: quoted as code, or with an end tag. In an answer a placeholder could
    only stand first.
    """
    if "<" not in text:
        return None
    text = _CODE.sub("", text)
    match = _MEDIA.match(text.lstrip()) if role == "assistant" else _MEDIA.search(text)
    return match[1] if match and f"</{match[1][1:]}" not in text else None


def images_of(row: dict[str, Any], sample_id: str, source: str) -> tuple[ImageSource, ...]:
    """The images that stand beside the turns, in `images` or `image`. Raises BadSample for one that is none."""
    values = [row[key] for key in ("images", "image") if not is_empty(row.get(key))]
    many = [list(held) if isinstance(held, list | tuple) else [held] for held in values]
    if len(many) == 2 and many[0] != many[1]:
        raise malformed(sample_id, source, "'image' and 'images' hold different images: keep one column")
    return tuple(image_of(one, sample_id, source) for one in many[0]) if many else ()


def image_of(held: Any, sample_id: str, source: str) -> ImageSource:
    """An image as a row holds it: a path, a data: URI, or encoded. Raises BadSample for what is none of these."""
    # The form that `datasets` gives an image in when it does not decode it.
    if isinstance(held, dict) and (held.get("bytes") or held.get("path")):
        if isinstance(held.get("bytes"), str):  # JSON has no bytes
            raise malformed(
                sample_id,
                source,
                "an image's 'bytes' are a text: write data:image/png;base64,… in place of the object",
            )
        held = held.get("bytes") or held["path"]
    if isinstance(held, str) and held:
        return _named_image(held, sample_id, source)
    if (isinstance(held, bytes) and held) or isinstance(held, EmbeddedImage):
        return held
    raise malformed(sample_id, source, f"an image is {found_in_words(held)}, neither a path nor an encoded image")


def _named_image(name: str, sample_id: str, source: str) -> ImageSource:
    """An image that a text gives: by its path, or as a data: URI."""
    if is_data_uri(name):
        try:
            return inline_image(name)
        except ValueError as error:
            raise malformed(sample_id, source, f"an image cannot be used: {error}") from error
    return _checked_path(name, "image", sample_id, source)


def _checked_path(name: str, what: str, sample_id: str, source: str) -> str:
    """A path that a file can have. `what`: of an "image" or a "video"."""
    shown = f"{name[:60]!r}{'…' if len(name) > 60 else ''}"
    if is_address(name):
        raise malformed(
            sample_id, source, f"the {what} {shown} is an address: fetch the {what}s, and name them by their paths"
        )
    if "\0" in name:
        raise malformed(sample_id, source, f"the {what} path {shown} has a NUL character")
    if name.splitlines() != [name]:
        raise malformed(sample_id, source, f"the {what} path {shown} has a line break")
    check_text(name, f"the {what} path {shown}", sample_id, source)
    if len(name.encode()) > _LONGEST_PATH:
        cure = "an image that is written out as base64 begins with data:image/png;base64,"
        cure = cure if what == "image" else "needed is that of a file"
        words = f"an {what} has a path of {len(name)} characters, {shown}: {cure}"
        raise malformed(sample_id, source, words)
    return name


def videos_of(row: dict[str, Any], sample_id: str, source: str) -> tuple[VideoSource, ...]:
    """The videos that stand beside the turns, in `videos` or `video`. Raises BadSample for one that is none.

    A list of image files is one video, of these frames; of video files, or of lists, one video each.
    """
    values = [row[key] for key in ("videos", "video") if not is_empty(row.get(key)) and row[key] is not False]
    many = [_as_videos(held) for held in values]
    if len(many) == 2 and many[0] != many[1]:
        raise malformed(sample_id, source, "'video' and 'videos' hold different videos: keep one column")
    return tuple(video_of(one, sample_id, source) for one in many[0]) if many else ()


def _as_videos(held: Any) -> list[Any]:
    """The videos of a column, not looked at yet."""
    if not isinstance(held, list | tuple):
        return [held]
    frames = [isinstance(one, str) and one.lower().endswith(SUFFIXES) for one in held]
    return [list(held)] if all(frames) else list(held)


def video_of(held: Any, sample_id: str, source: str) -> VideoSource:
    """A video as a row holds it: a path, or those of its frames. Raises BadSample for what is neither."""
    is_encoded = isinstance(held, bytes | EmbeddedImage)
    if isinstance(held, dict) and (held.get("path") or held.get("bytes")):  # as `datasets` gives one undecoded
        is_encoded, held = bool(held.get("bytes")), held.get("path")
    if is_encoded:
        words = "a video stands in the row as bytes: write it to a file, and name it by its path"
        raise malformed(sample_id, source, words)
    if isinstance(held, str) and held:
        if is_data_uri(held):
            raise malformed(sample_id, source, "a video is a data: URI: write it to a file, and name it by its path")
        return _checked_path(held, "video", sample_id, source)
    if isinstance(held, list | tuple) and held:
        for frame in held:
            if not (isinstance(frame, str) and frame.lower().endswith(SUFFIXES)):
                words = f"a frame of a video is {found_in_words(frame)}, no path of an image ({', '.join(SUFFIXES)})"
                raise malformed(sample_id, source, words)
        return tuple(_checked_path(frame, "video", sample_id, source) for frame in held)
    raise malformed(sample_id, source, f"a video is {found_in_words(held)}, neither a path nor a list of frames")


def malformed(sample_id: str, source: str, detail: str) -> BadSample:
    """The error that leaves a row out because of what stands in it."""
    return BadSample("malformed_row", sample_id, detail, source)


def found_in_words(value: Any) -> str:
    """A value that is not what was expected, cut to a line."""
    if isinstance(value, dict):
        return f"an object with the keys {sorted(map(str, value))}"
    # Half of a surrogate pair can be shown, but not written.
    text = json.dumps(value, ensure_ascii=False, default=repr).encode("utf-8", "backslashreplace").decode()
    return f"{type(value).__name__} {text[:80]}{'…' if len(text) > 80 else ''}"
