"""KFP component fetch_model."""
