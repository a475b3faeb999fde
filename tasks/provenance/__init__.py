"""Evidence of how a version came about, and its checks."""
