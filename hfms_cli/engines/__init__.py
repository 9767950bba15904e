"""A model's own process: `host` is the front's side of it, `worker` the other, `wire` what goes between them."""
