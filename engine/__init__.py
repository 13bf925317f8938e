"""The inference engine: loading, models, scheduling, sampling, and the worker process that runs them."""
