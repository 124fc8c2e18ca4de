"""KFP component of stage evaluate_clip."""
