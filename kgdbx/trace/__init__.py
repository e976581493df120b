"""Outputs of one event stream: text, JSON, Chrome JSON, binary streams and recordings."""
