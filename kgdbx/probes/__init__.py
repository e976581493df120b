"""Probes: what they are, where they go, and what happens when one is hit."""
