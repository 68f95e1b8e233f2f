"""The dirty app: a small text generator that learns from alice.txt when its worker starts."""

import os
import pathlib
import random
import re
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator

from gunicorn.dirty import DirtyApp

from gunicorn_dirty_gevent import stash

TEXT = pathlib.Path(__file__).with_name("alice.txt")
WORDS = int(os.environ.get("CHAT_WORDS", 80))  # in one answer
PACE = float(os.environ.get("CHAT_PACE", 0.05))  # seconds for a word: what a language model on a CPU may take
LONGEST = 60 + 2 * WORDS * PACE  # seconds; the entry of a generation whose process was killed goes then


class Writer(DirtyApp):
    stashes = ["running"]

    def init(self) -> None:
        """Learn which words follow which two, once in each dirty worker."""
        words = re.findall(r"[\w'-]+|[.,;:!?]", TEXT.read_text(encoding="utf-8"))
        self.starts: dict[str, list[tuple[str, str]]] = defaultdict(list)  # by word, in small letters
        self.follows: dict[tuple[str, str], list[str]] = defaultdict(list)
        words += words[:2]  # the end is followed by the beginning
        for one, two, three in zip(words, words[1:], words[2:], strict=False):
            self.follows[one, two].append(three)
            if one[0].isalpha():
                self.starts[one.lower()].append((one, two))

    def write(self, user: str, prompt: str) -> Iterator[dict[str, object]]:
        """A stream of tokens, begun at a word of the prompt. Closing it ends the generation."""
        me = uuid.uuid4().hex
        stash.put("running", me, user, ttl=LONGEST)
        try:
            yield {"worker": os.getpid()}
            for token in self._tokens(random.Random(f"{user}/{prompt}"), prompt):
                time.sleep(PACE)  # gevent lets the other generations of this worker go on
                yield {"token": token}
        finally:  # also when the browser has left
            stash.delete("running", me)

    def _tokens(self, chance: random.Random, prompt: str) -> Iterator[str]:
        known = [word for word in re.findall(r"[\w'-]+", prompt.lower()) if word in self.starts]
        # The longest word of the prompt says most about it.
        start = max(known, key=len) if known else chance.choice(sorted(self.starts))
        pair = chance.choice(self.starts[start])
        yield pair[0].capitalize()
        yield _spaced(pair[1])
        for _ in range(WORDS - 2):
            word = chance.choice(self.follows[pair])
            yield _spaced(word)
            pair = (pair[1], word)


def _spaced(word: str) -> str:
    return word if word in ".,;:!?" else f" {word}"
