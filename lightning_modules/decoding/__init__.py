"""Strategies that spend test-time compute: from plain sampling to search and reflection."""
