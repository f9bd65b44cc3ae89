"""Results on disk, and the tables and pictures made from them. Needs neither Ray nor PyTorch."""
