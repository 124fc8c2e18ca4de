"""KFP component of stage fetch_data."""
