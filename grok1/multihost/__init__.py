"""Several processes as one: started together, checked against each other, and ended together."""
