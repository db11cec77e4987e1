"""PNG files without the texts and colour profiles in them, which are no part of the picture."""

import io
import struct
import zlib
from typing import BinaryIO

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_WITHOUT_PIXELS = frozenset({b"tEXt", b"zTXt", b"iTXt", b"iCCP"})
_WITH_ORIENTATION = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
_ROOM = 1 << 19  # bytes of texts that are kept; Pillow refuses one of more than 1 MiB


def without_texts(file: BinaryIO) -> io.BytesIO:
    """A copy without text and profile chunks; those that say how the camera was held stay where they are small.

    Pillow refuses a file whose texts or profile are over its limits, which are a module's globals; other readers of
    PNG pass them over. What is no PNG, or broken off, is copied as far as it goes.
    """
    rest = io.BytesIO()
    rest.write(file.read(len(SIGNATURE)))
    room = _ROOM
    while len(header := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", header)
        if kind not in _WITHOUT_PIXELS:
            rest.write(header)
            rest.write(file.read(length + 4))
            continue
        body = file.read(length + 4) if length <= room else b""
        if not body:
            file.seek(length + 4, io.SEEK_CUR)
        elif body.startswith(_WITH_ORIENTATION) and (size := _size_of_text(kind, body, room)) <= room:
            room -= size
            rest.write(header + body)
    rest.seek(0)
    return rest


def _size_of_text(kind: bytes, body: bytes, room: int) -> int:
    """Bytes of a text when it is unpacked, or more than `room`."""
    if kind == b"tEXt":
        return len(body)
    rest = body.partition(b"\0")[2]
    if kind == b"iTXt" and rest[:1] == b"\0":  # not packed
        return len(body)
    if kind == b"iTXt":
        return room + 1  # XMP is never packed
    unpacking = zlib.decompressobj()
    try:
        text = unpacking.decompress(rest[1:-4], room + 1)
    except zlib.error:
        return room + 1
    return len(text)
