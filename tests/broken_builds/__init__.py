"""Builds that are broken on purpose: what the tests must notice."""
