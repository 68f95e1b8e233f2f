import gunicorn_dirty_gevent; gunicorn_dirty_gevent.install(queue_size=20, hub_blocked_after=6)  # noqa: E702, I001

bind = "127.0.0.1:8000"
worker_class = "asgi"  # gunicorn's own; the dirty side runs gevent all the same
asgi_disconnect_grace_period = 0  # a browser that leaves ends its stream now, not 3 s later
dirty_apps = ["tasks:Sudoku"]
dirty_workers = 2  # puzzles at once: each computes without a pause
dirty_timeout = 5  # seconds for a puzzle; in a stream, until the next chunk
