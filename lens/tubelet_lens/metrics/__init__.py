"""Metrics, one file each, with their settings."""
