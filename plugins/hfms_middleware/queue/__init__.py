"""How many calls may wait for an engine, and how long."""
