"""Dispatch, experts and combine as one op."""
