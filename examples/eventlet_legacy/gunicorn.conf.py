import gunicorn_dirty_gevent; gunicorn_dirty_gevent.install(queue_size=100)  # noqa: E702, I001

bind = "127.0.0.1:8000"
worker_class = "eventlet"  # gunicorn 25; gunicorn 26 has removed it
dirty_apps = ["tasks:Passwords"]
dirty_workers = 2  # hashes at once
dirty_timeout = 10  # seconds until a call is stopped
