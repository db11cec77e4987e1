"""What a request is refused with, as OpenAI's clients read it."""

from __future__ import annotations

from typing import Any

from shortzip.data.errors import UserError, printable


class Refused(UserError):
    """A request that is not answered.

    Attributes:
        status: of HTTP.
        code: one word for programs.
        retry_after: seconds after which to come again; None where that would change nothing.
    """

    def __init__(self, status: int, code: str, message: str, retry_after: int | None = None) -> None:
        super().__init__(printable(message))
        self.status, self.code, self.retry_after = status, code, retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The JSON that is answered."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": None, "code": self.code}}
