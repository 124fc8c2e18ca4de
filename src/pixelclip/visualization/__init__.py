"""Pictures of masks and predictions, and the HTML report."""
