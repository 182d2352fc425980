"""One file a command: each job from its options to its result."""
