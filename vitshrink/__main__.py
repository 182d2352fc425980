"""``python -m vitshrink``, the same as the ``vitshrink`` command."""

from vitshrink.cli import main

main()
