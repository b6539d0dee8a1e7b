"""The parameters: their table, weight formats, division over a mesh, tree, random values."""
