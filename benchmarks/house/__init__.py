"""How the package is built, what one job does twice, and how long a command takes to start."""
