"""What fits where, and how fast it could be."""
