"""One active-learning run: its random streams, its checks, its rounds."""
