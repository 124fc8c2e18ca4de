"""KFP component of stage train."""
