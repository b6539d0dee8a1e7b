"""Training of `bard`, the bundled model, with an independent implementation of the architecture."""
