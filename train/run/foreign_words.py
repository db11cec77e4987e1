"""What other libraries say that the user can do nothing about, each sentence kept back where it is said."""

from __future__ import annotations

import logging
from dataclasses import dataclass

UNWANTED = {
    "DeepSpeed": "Setting accelerator to CPU.",  # said on import, where there is no GPU
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",  # on import; a kernel for 4 bits on CPUs
}


@dataclass(frozen=True)  # equal ones are one: a logger takes a filter once
class _Without:
    """Keeps back a logger's messages that begin in a certain way."""

    beginning: str

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.beginning)


def keep_back() -> None:
    """From here on, `UNWANTED` are not said; everything else that these libraries say is."""
    for logger, beginning in UNWANTED.items():
        logging.getLogger(logger).addFilter(_Without(beginning))
