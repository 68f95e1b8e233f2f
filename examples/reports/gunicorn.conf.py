import gunicorn_dirty_gevent; gunicorn_dirty_gevent.install(queue_size=2, hub_blocked_after=3)  # noqa: E702, I001

bind = "127.0.0.1:8000"
worker_class = "gevent"
dirty_apps = ["tasks:Reports"]
dirty_workers = 2  # reports at once: each computes without a pause, so one in each dirty worker
dirty_timeout = 30  # seconds a call may run; a stream: until its next chunk
