"""Atomic, resumable stages, their provenance and their outputs in a store."""
