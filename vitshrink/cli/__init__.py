"""The command line: flags to config, config to pipeline, results to the terminal. Nothing below it prints."""

from vitshrink.cli.app import main

__all__ = ["main"]
