import gunicorn_dirty_gevent; gunicorn_dirty_gevent.install(queue_size=50)  # noqa: E702, I001

bind = "127.0.0.1:8000"
worker_class = "gevent"
dirty_apps = ["tasks:Writer"]
dirty_workers = 2
dirty_threads = 100  # generations at once in each dirty worker
dirty_timeout = 10  # seconds until the next token
