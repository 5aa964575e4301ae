"""What a request may ask for, and how it is refused."""

from __future__ import annotations

from dataclasses import dataclass

MB = 1_000_000


@dataclass(frozen=True)
class Limits:
    """How much is taken at once; beyond it a request is refused, and the server goes on."""

    upload: int = 20 * MB  # bytes of one request
    pictures: int = 64  # of one request
    queue: int = 128  # requests that are being read or wait for an answer
    batch: int = 64  # pictures that the model is shown at once, of requests that ask alike
    held: int = 1000 * MB  # bytes of all requests that are being read or wait
    pixels: int = 50_000_000  # of one picture: what a camera makes, and no decompression bomb
    slender: int = 100  # the longer side of one picture over the shorter: resizing keeps the shape
    names: int = 1000  # classes that a request may ask for
    topk: int = 1000
    patience: float = 60  # seconds in which a request must have arrived


class Refused(Exception):
    """A request that gets no answer: the HTTP status, why, in words, and what to do next."""

    def __init__(self, status: int, message: str, retry_after: int = 0):
        super().__init__(message)
        self.status = status
        self.headers = {"Retry-After": str(retry_after)} if retry_after else {}
