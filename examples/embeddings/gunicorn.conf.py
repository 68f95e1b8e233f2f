import gunicorn_dirty_gevent; gunicorn_dirty_gevent.install(queue_size=200)  # noqa: E702, I001

bind = "127.0.0.1:8000"
worker_class = "gevent"
workers = 2  # HTTP workers: they stay small, the model is in the dirty workers
dirty_apps = ["tasks:Search"]
dirty_workers = 2
dirty_timeout = 10  # seconds until a call is stopped
