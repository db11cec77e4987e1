"""Words that help with an image file: what lies there instead of a missing one, and what a file is that is none."""

import os
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff")
VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v")
_DRIVE = re.compile(r"[A-Za-z]:[\\/]|\\\\")
_KINDS = (
    (rb"\s*<(!doctype\s+)?html", "a web page: the download failed, fetch it again"),
    (rb"\s*<(\?xml|svg)", "XML or SVG: convert it to PNG"),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "PostScript: convert it to PNG"),
    (rb"%PDF", "a PDF: convert it to PNG"),
    (rb"8BPS", "a Photoshop file: convert it to PNG"),
    (rb"(?s)....ftyp(hei|hev|mif|msf)", "a HEIC photograph: convert it to JPEG"),
    (rb"version https://git-lfs", "a pointer of Git LFS: run git lfs pull"),
    (rb"PK\x03\x04|\x1f\x8b|7z\xbc\xaf|Rar!", "an archive: unpack it"),
    (rb"(?s)....ftyp|\x1aE\xdf\xa3|OggS|RIFF....AVI ", "a video"),
    (rb"\x00{16}", "zeros: the download broke off, fetch it again"),
)


def kind_of(start: bytes) -> str:
    """What a file is that begins with these bytes (16 or more), in words that go on after a colon; "" if unknown.

    The bytes themselves are not told: a link may show them of any file.
    """
    return next((words for pattern, words in _KINDS if re.match(pattern, start, re.IGNORECASE)), "")


def hint_for_missing(file: Path) -> str:
    """What lies there instead of a missing file, or what its path looks like, in brackets; "" for no idea.

    Some forty names are tried and no folder is listed: folders of instruction mixes hold hundreds of thousands.
    """
    folder = next((parent for parent in file.parents if os.path.isdir(parent)), None)
    if folder is None:
        return ""
    rest = str(file.relative_to(folder))
    for other, cure in _others(rest):
        if other != rest and os.path.isfile(folder / other):
            return f" (but there is {other}: {cure})"
    if _DRIVE.match(rest):
        return (
            " (a path of Windows with its drive: image paths are relative to the image root, with / between folders)"
        )
    if "\\" in rest:
        return " (its folders are separated as on Windows: write / instead of \\)"
    return ""


def _others(rest: str) -> Iterator[tuple[str, str]]:
    """Other ways to write a path, each with what to do if that is the right one."""
    slashed = rest.replace("\\", "/")
    if "\\" in rest:
        yield slashed, "write / instead of \\ in the image paths"
    for form in ("NFC", "NFD"):
        cure = f"its name only looks the same and is in Unicode's form {form}; write the image paths in it, or rename"
        yield unicodedata.normalize(form, slashed), cure
    # OCR-VQA's images are often saved under their true suffix, .gif or .png, where the JSON says .jpg.
    stem, suffix = os.path.splitext(slashed)
    usual = VIDEO_SUFFIXES if suffix.lower() in VIDEO_SUFFIXES else SUFFIXES
    for other in dict.fromkeys((suffix.lower(), suffix.upper(), *usual, *(ending.upper() for ending in usual))):
        yield stem + other, "rename it, the content decides"
    name = slashed.rsplit("/", 1)
    for changed in (name[-1].lower(), name[-1].upper()):
        yield "/".join([*name[:-1], changed]), "capitals count in names"
    yield slashed.lower(), "capitals count in names"
    parts = slashed.split("/")
    for number in range(1, min(len(parts), 8)):
        yield "/".join(parts[number:]), "image paths are relative to the image root"
