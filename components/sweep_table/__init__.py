"""KFP component of a sweep's table."""
