"""The dirty app: a sentence-embedding model, and a small corpus to search by meaning."""

import os
import pathlib
import time

from gunicorn.dirty import DirtyApp

CORPUS = pathlib.Path(__file__).with_name("help.txt")


class Search(DirtyApp):
    def init(self) -> None:
        """Load the model and embed the corpus, once in each dirty worker."""
        import wordllama  # here, so that only dirty workers pay for it

        started = time.monotonic()
        self.sentences = [line for line in CORPUS.read_text(encoding="utf-8").splitlines() if line]
        # The package carries model and tokenizer; nothing is downloaded.
        package = pathlib.Path(wordllama.__file__).parent
        self.model = wordllama.WordLlama.load(cache_dir=package, disable_download=True)
        self.vectors = self.model.embed(self.sentences, norm=True)
        took = time.monotonic() - started
        print(
            f"worker {os.getpid()}: model loaded, {len(self.sentences)} sentences in {took:.2f} s", flush=True
        )

    def search(self, question: str, count: int) -> dict[str, object]:
        """The sentences nearest to the question, best first."""
        scores = self.vectors @ self.model.embed([question], norm=True)[0]
        best = scores.argsort()[::-1][:count]
        # numpy's numbers and strings do not travel: plain ones do.
        hits = [
            {"sentence": self.sentences[place], "score": round(float(scores[place]), 3)} for place in best
        ]
        return {"hits": hits, "worker": os.getpid()}

    def embed(self, texts: list[str]) -> list[list[float]]:
        return self.model.embed(texts, norm=True).tolist()
