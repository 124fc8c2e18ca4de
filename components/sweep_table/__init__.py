"""KFP component sweep_table."""
