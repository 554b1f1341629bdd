"""Files: graphs of our own, and one module per foreign format."""
