"""One active-learning run: random streams, inputs, plan, journal and rounds."""
