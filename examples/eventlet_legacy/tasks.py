"""The dirty app: passwords are hashed here, for a hash is slow on purpose."""

import hashlib
import hmac
import os
from collections.abc import Iterator

from gunicorn.dirty import DirtyApp

from gunicorn_dirty_gevent import stash

COST = 2**14  # scrypt's n: 16 MiB of memory for each hash


class Passwords(DirtyApp):
    stashes = ["users"]

    def register(self, user: str, password: str) -> bool:
        """Whether the user is new."""
        salt = os.urandom(16)
        return stash.add("users", user, {"salt": salt, "cost": COST, "hash": _hash(password, salt, COST)})

    def check(self, user: str, password: str) -> bool:
        # A hash for unknown users too: else the time would tell who is registered.
        entry = stash.get("users", user, {"salt": b"", "cost": COST, "hash": b""})
        return hmac.compare_digest(_hash(password, entry["salt"], entry["cost"]), entry["hash"])

    def costs(self) -> Iterator[dict]:
        """A stream: what one hash takes at each cost, to choose by."""
        for power in range(10, 17):
            started = os.times().elapsed
            _hash("correct horse", b"salt", 2**power)
            yield {"cost": 2**power, "seconds": round(os.times().elapsed - started, 2)}


def _hash(password: str, salt: bytes, cost: int) -> bytes:
    return hashlib.scrypt(password.encode(), salt=salt, n=cost, r=8, p=1, maxmem=256 * 1024 * 1024)
