"""KFP component of stage train on several nodes."""
