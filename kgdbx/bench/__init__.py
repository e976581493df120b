"""Measurements: every number that the documentation states comes from here."""
