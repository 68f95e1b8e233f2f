import gunicorn_dirty_gevent; gunicorn_dirty_gevent.install()  # noqa: E702, I001

bind = "127.0.0.1:8000"
worker_class = "gevent"
dirty_apps = ["tasks:ImageApp"]
dirty_workers = 2
dirty_threads = 8  # calls at once in each dirty worker
dirty_timeout = 30  # seconds until a call is stopped
