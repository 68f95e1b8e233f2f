"""gunicorn dirty arbiters that work under gevent."""
