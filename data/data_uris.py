"""Images written into the instruction file itself, as `data:` URIs (RFC 2397)."""

import base64
import binascii
import hashlib
import re
from dataclasses import dataclass, field
from urllib.parse import unquote_to_bytes

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


@dataclass(frozen=True, slots=True)
class InlineImage:
    """An image that stood in the row itself.

    Attributes:
        name: what messages call it: its type, size and a hash of its content.
        content: the encoded image.
    """

    name: str
    content: bytes = field(repr=False)

    def read(self) -> bytes:
        """The encoded image (JPEG, PNG, …)."""
        return self.content


def is_data_uri(text: str) -> bool:
    """Whether a text is a `data:` URI."""
    return text[:5].lower() == "data:"


def is_address(text: str) -> bool:
    """Whether a text is an address of the web, of a bucket, or another that names its scheme."""
    return _ADDRESS.match(text) is not None


def inline_image(uri: str) -> InlineImage:
    """The image of a `data:` URI.

    Raises:
        ValueError: no comma, no content, or content that is not base64; the message says which.
    """
    head, comma, body = uri[5:].partition(",")
    if not comma:
        raise ValueError("its data: URI has no comma before the content")
    kind, *parameters = (part.strip().lower() for part in head.split(";"))
    try:
        content = unquote_to_bytes(body)
        if "base64" in parameters:
            plain = b"".join(content.split()).translate(bytes.maketrans(b"-_", b"+/")).rstrip(b"=")
            content = base64.b64decode(plain + b"=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise ValueError(f"its data: URI does not hold base64 ({error})") from error
    if not content:
        raise ValueError("its data: URI is empty")
    digest = hashlib.blake2b(content, digest_size=6).hexdigest()
    return InlineImage(f"<{kind[:40] or 'data'} of {len(content)} bytes, {digest}>", content)
