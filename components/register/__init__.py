"""KFP component of stage register."""
