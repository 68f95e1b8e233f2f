"""The pure core: bytes or events and `now` in, events or actions out."""
