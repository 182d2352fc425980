"""What the demo's checkpoints get right in a fresh process, with stock transformers calls."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from vitshrink.errors import OutputError

RELOAD_SCRIPT = '''\
"""Count what checkpoints, loaded with stock transformers calls, get right: reload.py IMAGES CHECKPOINT..."""

import json
import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

import vitshrink  # noqa: F401 (registers the checkpoint format)

folder, checkpoints = Path(sys.argv[1]), sys.argv[2:]
files = sorted(folder.glob("*/*.png"))
images = [Image.open(file).convert("RGB") for file in files]
correct = {}
for checkpoint in checkpoints:
    processor = AutoImageProcessor.from_pretrained(checkpoint)
    model = AutoModelForImageClassification.from_pretrained(checkpoint).eval()
    with torch.inference_mode():
        logits = model(**processor(images, return_tensors="pt")).logits
    names = [model.config.id2label[index] for index in logits.argmax(dim=-1).tolist()]
    correct[checkpoint] = sum(name == file.parent.name for name, file in zip(names, files, strict=True))
json.dump(correct, sys.stdout)
'''


def reload_correct(script: Path, images: Path, checkpoints: Iterable[Path]) -> dict[Path, int]:
    """Write ``script``, which uses stock transformers calls only, and run it in a new process.

    Returns how many of ``images/<class>/*.png`` each checkpoint gets right. Raises OutputError when the
    process fails.
    """
    script.write_text(RELOAD_SCRIPT, encoding="utf-8")
    command = [sys.executable, str(script), str(images), *map(str, checkpoints)]
    # the package's own folder, so that a source tree that is not installed works too
    import_path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": import_path}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if process.returncode != 0:
        raise OutputError(
            f"{script} could not reload the checkpoints (exit code {process.returncode}):\n{process.stderr}"
        )
    return {Path(checkpoint): correct for checkpoint, correct in json.loads(process.stdout).items()}


def check_reload(script: Path, images: Path, expected: Mapping[Path, int]) -> None:
    """Raises OutputError when a checkpoint, reloaded in a new process, gets another number right than expected."""
    for checkpoint, correct in reload_correct(script, images, expected).items():
        if correct != expected[checkpoint]:
            raise OutputError(
                f"{checkpoint} gets {correct} images right in a fresh process, but its report says "
                f"{expected[checkpoint]}: do not use it, and please report this as a bug."
            )
