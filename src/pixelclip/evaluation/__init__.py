"""Protocols, predictions and metrics on labelled sets."""
