"""``vitshrink demo``: the main job on an embedded example."""

from pathlib import Path
from typing import Annotated

import typer

from vitshrink.cli import console


@console.reported
def demo_command(
    output: Annotated[Path, typer.Option(help="Directory for the model, the images and the results.")] = Path(
        "demo-output"
    ),
    seed: Annotated[int, typer.Option(help="Seed for the training and the samples.")] = 0,
) -> None:
    """Train a small ViT on scanned digits, make it smaller and faster in every way, and compare. Offline."""
    from vitshrink.jobs.demo import run_demo

    run_demo(output, console.say, seed=seed)
