"""`hfms models tune`: every way to run a model here, measured in its real worker process, and which is the best."""
