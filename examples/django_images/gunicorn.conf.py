import gunicorn_dirty_gevent; gunicorn_dirty_gevent.install(queue_size=20)  # noqa: E702, I001

bind = "127.0.0.1:8000"
worker_class = "gevent"
dirty_apps = ["tasks:Thumbnails"]
dirty_workers = 2  # pictures at once: Pillow computes without a pause
dirty_timeout = 20  # seconds until the next thumbnail
