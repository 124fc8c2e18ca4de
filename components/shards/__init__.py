"""KFP component of stage shards."""
