"""The settings of a server, and where its key comes from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from halfplate.errors import HalfplateError

KEY_VARIABLE = "HALFPLATE_API_KEY"
CACHE_DTYPES = (
    "fp32",
    "bf16",
    "int8",
)  # as in runtime/kept.py, which this module does not import because the command line reads it first
LOCAL = ("localhost", "127.0.0.1", "::1")
LONGEST_KEY = 4096  # characters


@dataclass(frozen=True)
class ServeSettings:
    """How a model is served.

    key: what clients send as `Authorization: Bearer KEY`; None lets everyone in.
    max_tokens: most tokens of an answer. max_body: most bytes of a request.
    max_requests: requests that run or wait; more are refused. max_batch: of them, those that run together.
    prompt_cache: most bytes of keys and values of recent requests. cache_dtype: of keys and values.
    activations: as in `halfplate.runtime.accelerate`.
    """

    model: str
    host: str = "localhost"
    port: int = 8000
    device: str = "cpu"
    dtype: str = "auto"
    key: str | None = field(default=None, repr=False)
    max_tokens: int = 4096
    max_body: int = 1_000_000
    max_requests: int = 64
    max_batch: int = 8
    prompt_cache: int = 256_000_000
    cache_dtype: str = "fp32"
    activations: str = "auto"
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not 1 <= self.port <= 65535:
            raise HalfplateError(f"--port {self.port} is not a port; expected 1 to 65535")
        for name in ("max_tokens", "max_body", "max_requests", "max_batch"):
            if getattr(self, name) < 1:
                raise HalfplateError(f"{name}={getattr(self, name)} is out of range; expected at least 1")
        if self.prompt_cache < 0:
            raise HalfplateError(f"prompt_cache={self.prompt_cache} is out of range; expected at least 0")
        if self.cache_dtype not in CACHE_DTYPES:
            raise HalfplateError(
                f"cache_dtype={self.cache_dtype!r} is not one of {', '.join(CACHE_DTYPES)}; leave it out for fp32"
            )

    @property
    def open_to_others(self) -> bool:
        """Whether other machines reach it and need no key."""
        return self.key is None and self.host not in LOCAL


def found_key(file: str | None, environment: Mapping[str, str] = os.environ) -> str | None:
    """The key in `file`, or else in the environment variable; None without either. Raises HalfplateError if it is not one line of printable ASCII."""
    if file is None:
        key, where = environment.get(KEY_VARIABLE), KEY_VARIABLE
    else:
        where = f"--api-key-file {file!r}"
        try:
            path = Path(file)
            if not path.is_file():  # opening a pipe would wait for a writer
                raise HalfplateError(f"{where} is not a file; write the key to it, on one line")
            with path.open(encoding="ascii") as opened:
                key = opened.read(LONGEST_KEY + 2).removesuffix("\n").removesuffix("\r")
        except (OSError, ValueError) as error:
            raise HalfplateError(
                f"{where} cannot be read ({' '.join(str(error).split())}); write the key to it"
            ) from None
    if key is None:
        return None
    if not key or len(key) > LONGEST_KEY or not key.isascii() or not key.isprintable() or " " in key:
        raise HalfplateError(f"{where} holds no key; expected one line of printable ASCII without spaces")
    return key
