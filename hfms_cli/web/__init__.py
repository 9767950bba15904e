"""HTTP: all JSON is made and read here, and nowhere below."""
