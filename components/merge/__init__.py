"""KFP component of `merge`."""
