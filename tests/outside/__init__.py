"""vitshrink tried from outside: odd checkpoints, odd data and odd surroundings, combined by chance.

An oddity is a small named function that changes one thing of an ordinary job. They lie in files named for what they
hold, and a new one is a few lines: ``@oddity(Checkpoint)`` above a function that takes what it changes. A case is a
model, a command and some oddities; it runs the command line as a process of its own and is judged by what a user sees.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the tests import what they share by its bare name
