"""Parameters: their table, weight formats, sharding, the parameter tree, random values."""
