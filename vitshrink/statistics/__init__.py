"""What is learned from samples, and the linear algebra on it."""
