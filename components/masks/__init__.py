"""KFP component of stage masks."""
