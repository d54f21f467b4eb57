"""Sweeps: families x sizes x token budgets x mixtures x seeds from one plan, each size trained once for all budgets."""
