"""Results on disk, and the tables and pictures made of them. Needs neither Ray nor torch."""
