"""The engine: the compiled prefill and decode steps, and the loop that serves sequences with them."""
