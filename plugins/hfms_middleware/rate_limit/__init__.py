"""Limits: requests a minute, and a model's tokens a minute and a day, for each key or address."""
