"""Scores of decoded answers, trivial baselines and their uncertainty. Plain Python and numpy: no model, no device."""
