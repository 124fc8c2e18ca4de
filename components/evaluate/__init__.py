"""KFP component of stage evaluate."""
