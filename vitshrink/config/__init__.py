"""What a job is asked to do: its options, the recipe that holds them, and names that are safe to write."""
