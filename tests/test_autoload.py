"""transformers loads compressed checkpoints once vitshrink is imported, in whatever order that happens."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMALL = Path(__file__).parent / "fixtures" / "compressed" / "bert-classifier" / "checkpoint"

LOAD = f"""
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained({str(SMALL)!r})
assert model.config.quantization_config.quant_method == "vitshrink"
assert any(type(each).__name__ == "LowRankLinear" for each in model.modules())
"""

THREAD = f"""
import threading, vitshrink
problems = []
def work():
    try:
        exec({LOAD!r}, {{}})
    except BaseException as error:
        problems.append(error)
thread = threading.Thread(target=work)
thread.start()
thread.join()
assert not problems, problems
"""

PICKLED = f"""
import pickle, vitshrink
{LOAD}
again = pickle.loads(pickle.dumps(model))
assert again.config.quantization_config.layers == model.config.quantization_config.layers
"""

ORDERS = {
    "vitshrink first": f"import vitshrink\n{LOAD}",
    "transformers first": f"import transformers.quantizers.auto, vitshrink\n{LOAD}",
    "transformers begun": f"import transformers, vitshrink\n{LOAD}",
    "reloaded": f"import importlib, vitshrink\nimportlib.reload(vitshrink)\n{LOAD}\nimportlib.reload(vitshrink)",
    "the reader reloaded": f"import importlib, vitshrink\nimportlib.reload(vitshrink.hf_quantizer)\n{LOAD}",
    "in a thread": THREAD,
    "pickled": PICKLED,
}


def run(script: str) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize(
    "order", [pytest.param(order, marks=[pytest.mark.slow] * (order != "vitshrink first")) for order in ORDERS]
)
def test_compressed_checkpoints_load(order: str) -> None:
    done = run(ORDERS[order])
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_without_vitshrink_loading_fails() -> None:
    done = run(LOAD)
    assert done.returncode != 0


def test_vitshrink_alone_imports_neither() -> None:
    done = run("import sys, vitshrink\nassert not {'torch', 'transformers'} & set(sys.modules)\nprint(dir(vitshrink))")
    assert done.returncode == 0, done.stderr
    assert "'load'" in done.stdout
