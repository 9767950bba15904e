"""`hfms conformance`: what clients of OpenAI's API rely on, checked against any server that speaks it.

server.py asks, suite.py keeps the checks and runs them, checks/ has a module a group. A check knows nothing of hfms: it
is named by what a client relies on, and takes every answer that OpenAI's API leaves open.
"""
