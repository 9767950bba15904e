"""Measures any server that speaks OpenAI's API: what to ask (dataset), asking it (load), and what came of it (measure,
compare). Knows nothing of hfms's own server: it sees what a client sees."""
