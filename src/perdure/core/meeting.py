"""Processes that were started together find each other, or say in a sentence that they did not."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta

from perdure.core.errors import PerdureError

JOINING = timedelta(minutes=10)  # for how long the others are waited for
NOTICE = 15.0  # seconds until it is said that they are


@contextlib.contextmanager
def coming_together(own: int, total: int) -> Iterator[None]:
    """Say who is waited for, and give up in a sentence."""
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    told = f"RANK, WORLD_SIZE and MASTER_ADDR, or MPI, say that this is process {own} of {total}, which meet at {place}"
    notice = threading.Timer(NOTICE, print, (f"Waiting for the others: {told}.",), {"file": sys.stderr, "flush": True})
    notice.daemon = True
    notice.start()
    try:
        yield
    except RuntimeError as error:
        raise PerdureError(
            f"The processes of this run have not come together within {JOINING.seconds} s: {told}. Start all, at one "
            "address that every machine reaches; or, where this process is to run alone, unset RANK and WORLD_SIZE."
        ) from error
    finally:
        notice.cancel()
