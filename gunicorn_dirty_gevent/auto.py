"""``gunicorn -c python:gunicorn_dirty_gevent.auto``: `install()` and nothing else."""

import gunicorn_dirty_gevent

gunicorn_dirty_gevent.install()
