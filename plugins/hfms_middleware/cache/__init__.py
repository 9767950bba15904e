"""Answers that would come out the same again: kept, and made once for all who ask at the same time."""
