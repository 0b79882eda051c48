"""Forecasts of real streams by the learner, by baselines and by deep-river."""
