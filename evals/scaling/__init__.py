"""Scaling laws of arXiv 2504.07951: fits to the records of a sweep, compute-optimal sizes, plans and plots."""
