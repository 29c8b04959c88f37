"""What of a model is kept under a budget: candidates of each matrix measured, and chosen among."""
