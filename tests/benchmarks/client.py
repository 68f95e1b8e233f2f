"""A client process: ``client.py CONTESTANT PATH full|quick``.

Reads row names, one per line, and answers with a line of JSON. It ends with the first error: greenlets
of the row that failed could disturb the next.
"""

from gevent import monkey

monkey.patch_all()

import json  # noqa: E402
import sys  # noqa: E402

import rows  # noqa: E402
from contestants import Missing, caller_factory, is_floor  # noqa: E402


def main() -> None:
    _, contestant, path, mode = sys.argv
    scale = rows.Scale(quick=mode == "quick", slow=contestant.startswith("stock"))
    new = caller_factory(contestant, path)
    # Read without gevent: nothing else happens between two rows.
    with open(0, closefd=False) as orders:
        while name := orders.readline().strip():
            try:
                values = rows.run(name, new, scale, floor=is_floor(contestant))
                print(json.dumps({"values": values}), flush=True)
            except Missing:
                print(json.dumps({"values": {}}), flush=True)
            except Exception as error:
                print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)
                return


if __name__ == "__main__":
    main()
