"""What a job is asked to do: groups of options, the jobs made of them, recipes, and names that are safe to write."""
