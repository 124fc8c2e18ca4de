"""KFP component of the revision of the data."""
