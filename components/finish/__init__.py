"""KFP component of the end of a run."""
