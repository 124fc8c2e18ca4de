"""Atomic files and checksums, and copies of URLs and `s3://` objects in a bounded, shared cache."""
