"""What recovery gives back, and what its techniques cost: Markdown tables.

    python benchmarks/recovery.py --small COMPRESSED --teacher DENSE --data UNLABELED --eval LABELED --minutes 5
    python benchmarks/recovery.py --memory

With ``--small``, one row a technique: each trains the same compressed directory on the same samples, and is judged on
the same others. With ``--memory``, one step of training on the shapes of ViT-S/16 at 224 pixels: the bytes that
autograd keeps between the forward and the backward pass, and the seconds of processor time of both.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tables import print_circumstances, print_head, print_row
from torch import Tensor
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification

from vitshrink.config.options import DataConfig, FinetuneJob
from vitshrink.evaluation.quality import Evaluation, Fidelity, Quality
from vitshrink.jobs.evaluate import evaluate_checkpoint
from vitshrink.jobs.finetune import finetune_checkpoint
from vitshrink.recovery.criteria import train_mode
from vitshrink.recovery.techniques.decatt import observed_heads
from vitshrink.recovery.techniques.recomputation import recomputed_activations
from vitshrink.recovery.techniques.reversible import bidirectional

TECHNIQUES: dict[str, dict[str, Any]] = {
    "distill": {},
    "distill, factors only": {"train": "factors"},
    "distill, no augmentation": {"augment": False},
    "distill, nothing blended": {"mixing": 0.0},
    "distill, logits only": {"features": 0.0},
    "distill, 2 epochs block by block first": {"blockwise": 2},
    "distill, DeCAtt 0.01": {"decatt": 0.01},
    "distill, BDIA": {"bdia": True},
    "distill, BDIA, gamma 1/8": {"bdia": True, "gamma": 0.125},
    "distill, BDIA, momentum 1/8": {"bdia": True, "gamma": 0.125, "momentum": True},
    "distill, reversible": {"reversible": True},
    "distill, reversible, gamma 1/8": {"reversible": True, "gamma": 0.125},
    "distill, gradient checkpointing": {"gradient_checkpointing": True},
    "distill, eager attention": {"attention": "eager"},
    "supervised": {"objective": "supervised"},
    "supervised, half distillation": {"objective": "supervised", "distillation": 0.5},
}


def print_recovery(arguments: argparse.Namespace) -> None:
    data = DataConfig(arguments.eval)
    limits = {"limit": arguments.eval_limit, "offline": True}
    start = evaluate_checkpoint(arguments.small, data, baseline=arguments.teacher, **limits).evaluation
    columns = ["training", "top-1", "KL", "agreement", "held-out before", "held-out after", "epochs", "minutes"]
    print_head([*columns, "seconds a step"])
    print_row(["dense", _figure(_top1(start.dense)), *["–"] * 7])
    print_row(["none", *_scores(start), *["–"] * 5])
    for name in arguments.techniques:
        with TemporaryDirectory() as folder:
            entries = {"epochs": arguments.epochs, "minutes": arguments.minutes, "samples": arguments.samples}
            entries |= {"learning_rate": arguments.learning_rate} if arguments.learning_rate else {}
            job = FinetuneJob.from_mapping(
                {
                    "model": arguments.small,
                    "output": str(Path(folder) / "out"),
                    "teacher": arguments.teacher,
                    "data": arguments.data,
                    "eval": arguments.eval,
                    "eval_limit": arguments.eval_limit,
                    "offline": True,
                    **entries,
                    **TECHNIQUES[name],
                }
            )
            report = finetune_checkpoint(job).report
        assert report.recovery is not None
        found = report.recovery
        print_row(
            [
                name,
                *_scores(report.evaluation),
                _figure(found.before),
                _figure(found.after),
                f"{found.history[-1].epoch:.1f}",
                f"{found.seconds / 60:.1f}",
                f"{found.seconds / found.history[-1].step:.2f}",
            ]
        )


def _scores(evaluation: Evaluation | None) -> list[str]:
    if evaluation is None:
        return ["–"] * 3
    fidelity = evaluation.fidelity or Fidelity()
    return [_figure(_top1(evaluation.compressed)), _figure(fidelity.kl), _figure(fidelity.agreement)]


def _top1(quality: Quality | None) -> float | None:
    return None if quality is None else quality.score("top1")


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def print_memory(batch: int, depths: Sequence[int], repeats: int) -> None:
    print_head(["depth", "training", "activations an image, MB", "of plain", "CPU seconds a step", "of plain"])
    for depth in depths:
        torch.manual_seed(0)
        config = ViTConfig(
            hidden_size=384, num_attention_heads=6, intermediate_size=1536, num_hidden_layers=depth, num_labels=1000
        )
        model = ViTForImageClassification(config)
        pixels = torch.randn(batch, 3, 224, 224)
        first: tuple[float, float] | None = None
        for name, enter in WAYS.items():
            with ExitStack() as inside:
                loss_of = enter(model, inside)
                train_mode(model, dropout=False)
                kept = activation_bytes(model, pixels, loss_of) / batch / 1e6
                seconds = min(_step_seconds(model, pixels, loss_of) for _ in range(repeats))
            first = first or (kept, seconds)
            print_row(
                [
                    str(depth),
                    name,
                    f"{kept:.1f}",
                    f"{kept / first[0]:.2f}",
                    f"{seconds:.2f}",
                    f"{seconds / first[1]:.2f}",
                ]
            )


Loss = Callable[[Tensor], Tensor]
"""Of the logits of a pass."""
Enter = Callable[[PreTrainedModel, ExitStack], Loss]


def _of_logits(logits: Tensor) -> Tensor:
    return logits.square().mean()


def _plain(_model: PreTrainedModel, _inside: ExitStack) -> Loss:
    return _of_logits


def _checkpointed(model: PreTrainedModel, inside: ExitStack) -> Loss:
    inside.enter_context(recomputed_activations(model))
    return _of_logits


def _bdia(model: PreTrainedModel, inside: ExitStack) -> Loss:
    inside.enter_context(bidirectional(model, reversible=False))
    return _of_logits


def _reversible(model: PreTrainedModel, inside: ExitStack) -> Loss:
    inside.enter_context(bidirectional(model, reversible=True))
    return _of_logits


def _eighth(model: PreTrainedModel, inside: ExitStack) -> Loss:
    inside.enter_context(bidirectional(model, reversible=True, gamma=0.125))
    return _of_logits


def _decatt(model: PreTrainedModel, inside: ExitStack) -> Loss:
    heads = inside.enter_context(observed_heads(model))
    return lambda logits: _of_logits(logits) + 0.01 * heads.correlation(None)


def _eager(model: PreTrainedModel, inside: ExitStack) -> Loss:
    model.set_attn_implementation("eager")
    inside.callback(model.set_attn_implementation, "sdpa")
    return _of_logits


WAYS: dict[str, Enter] = {
    "plain (sdpa)": _plain,
    "eager attention": _eager,
    "gradient checkpointing": _checkpointed,
    "DeCAtt": _decatt,
    "BDIA": _bdia,
    "BDIA, reversible": _reversible,
    "BDIA, reversible, gamma 1/8": _eighth,
}


def activation_bytes(model: PreTrainedModel, pixels: Tensor, loss_of: Loss) -> int:
    """Bytes kept for the backward pass of one step, parameters and pixels left out."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers(), pixels)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(model(pixel_values=pixels).logits)
    node = next((fn for fn in _nodes(loss.grad_fn) if hasattr(fn, "kept")), None)
    total = sum(kept.values()) + (sum(bits.nbytes for bits in node.kept) if node is not None else 0)
    loss.backward()
    model.zero_grad()
    return total


def _nodes(node: Any) -> Any:
    """All nodes of a graph of gradients."""
    seen, waiting = set(), [node]
    while waiting:
        current = waiting.pop()
        if current is None or current in seen:
            continue
        seen.add(current)
        yield current
        waiting += [entry for entry, _ in current.next_functions]


def _step_seconds(model: PreTrainedModel, pixels: Tensor, loss_of: Loss) -> float:
    started = time.process_time()
    loss_of(model(pixel_values=pixels).logits).backward()
    elapsed = time.process_time() - started
    model.zero_grad()
    return elapsed


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", action="store_true", help="memory and time of a step")
    parser.add_argument("--small", help="a compressed directory")
    parser.add_argument("--teacher", help="the dense model")
    parser.add_argument("--data", help="samples to train on")
    parser.add_argument("--eval", help="samples to judge by")
    parser.add_argument("--eval-limit", type=int)
    parser.add_argument("--samples", type=int)
    parser.add_argument("--epochs", type=float, default=100.0)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--techniques", nargs="+", default=["distill"], choices=TECHNIQUES, metavar="TECHNIQUE")
    parser.add_argument("--depths", type=int, nargs="+", default=[6, 12, 24])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args(arguments)
    if given.memory:
        print_circumstances("A step of training, ViT-S/16 shapes", batch=given.batch)
        print_memory(given.batch, given.depths, given.repeats)
        return
    if not all((given.small, given.teacher, given.data, given.eval)):
        parser.error("pass --memory, or --small, --teacher, --data and --eval")
    print_circumstances(
        "Recovery", small=Path(given.small).name, teacher=Path(given.teacher).name, minutes=given.minutes
    )
    print_recovery(given)


if __name__ == "__main__":
    main()
