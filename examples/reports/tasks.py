"""The dirty app: how sure can we be of the mean order value? (a bootstrap, all CPU)"""

import csv
import pathlib
import random
import statistics
from collections.abc import Iterator

from gunicorn.dirty import DirtyApp

from gunicorn_dirty_gevent import action

ORDERS = pathlib.Path(__file__).with_name("orders.csv")
STEP = 500  # samples between two words of progress: well under a second


class Reports(DirtyApp):
    def init(self) -> None:
        self.orders: dict[str, list[float]] = {}
        with ORDERS.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                self.orders.setdefault(row["region"], []).append(float(row["amount"]))

    def regions(self) -> list[str]:
        return sorted(self.orders)

    def report(self, region: str, samples: int) -> Iterator[dict[str, object]]:
        """A stream: the progress, then the mean order with the range it is in with 95 %."""
        chance, orders, means = random.Random(region), self.orders[region], []
        yield {"region": region, "done": 0}
        while len(means) < samples:
            for _ in range(min(STEP, samples - len(means))):
                means.append(statistics.fmean(chance.choices(orders, k=len(orders))))
            yield {"region": region, "done": len(means) / samples}
        means.sort()
        low, high = means[len(means) // 40], means[-1 - len(means) // 40]
        yield {"region": region, "mean": statistics.fmean(orders), "from": low, "to": high}

    @action(timeout=2)
    def quick(self, region: str, samples: int) -> dict[str, object]:
        """The last chunk of the report, for those who can wait 2 seconds and no longer."""
        *_, last = self.report(region, samples)
        return last
