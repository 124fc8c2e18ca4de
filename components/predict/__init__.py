"""KFP component of `predict`."""
