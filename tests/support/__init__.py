"""What the tests stand on: a real gunicorn, bounded waits, leak checks."""
