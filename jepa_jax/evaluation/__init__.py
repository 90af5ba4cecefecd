"""Judging an encoder: features, probes, collapse metrics, the report."""
