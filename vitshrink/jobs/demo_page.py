"""The table and the page that compare what the demo has made."""

from collections.abc import Sequence

from vitshrink.evaluation.quality import Accuracy
from vitshrink.jobs.demo_parts import BATCH_SIZE, Made
from vitshrink.jobs.digits import CALIBRATION_IMAGES, HELD_OUT
from vitshrink.report import Report

HEADINGS = ("vitshrink", "file, kB", "parameters", "time", "top-1", "same as dense", "KL")


def comparison_table(made: Sequence[Made]) -> str:
    """A line for the dense model and for each part: Markdown, padded so that it reads well on a terminal too."""
    lines = [list(HEADINGS), _dense_line(made[0].report), *map(_line, made)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    padded = [
        [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        for line in lines
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in [padded[0], rule, *padded[1:]])


def comparison_page(table: str, made: Sequence[Made], missing: Sequence[str]) -> str:
    """Markdown: what was done, the table, links to the reports, and what is not part of it."""
    links = "\n".join(f"- {each.part}: [report](compressed/{each.directory.name}/report.html)" for each in made)
    runtimes = {each.part.runtime for each in made} - {None}
    timed = "PyTorch" + "".join(f", static integers in {name}" for name in runtimes)
    return (
        "# One model of scanned digits, made smaller and faster\n\n"
        f"A ViT was trained on scanned digits and compressed with {CALIBRATION_IMAGES} unlabeled training images.\n"
        f"The test set is {HELD_OUT} images that neither training nor compression used. KL (nats) is the divergence\n"
        f"from the dense model. Time is the latency of a batch of {BATCH_SIZE}, as a fraction of the dense model's;\n"
        f"both were timed in turn on one thread in the same runtime ({timed}).\n\n"
        f"{table}\n\n{links}\n\n"
        f"Not part of the demo:\n\n" + "".join(f"- {each}\n" for each in missing)
    )


def accuracies(report: Report) -> tuple[Accuracy, Accuracy]:
    """Of the dense and of the compressed model: the digits have labels, and both models were run on them."""
    assert report.evaluation is not None
    dense, compressed = report.evaluation.dense, report.evaluation.compressed
    assert isinstance(dense, Accuracy)
    assert isinstance(compressed, Accuracy)
    return dense, compressed


def _dense_line(report: Report) -> list[str]:
    assert report.bytes is not None
    dense, _ = accuracies(report)
    return ["(dense)", f"{report.bytes.dense / 1e3:.0f}", "100 %", "1.00", f"{100 * dense.top1:.1f} %", "100.0 %", "0"]


def _line(made: Made) -> list[str]:
    report, (_, scores) = made.report, accuracies(made.report)
    fidelity = report.evaluation and report.evaluation.fidelity
    assert report.bytes is not None
    assert fidelity is not None
    assert fidelity.agreement is not None
    ratio = report.latency_ratio
    return [
        str(made.part),
        f"{report.bytes.compressed / 1e3:.0f}",
        f"{100 * report.parameters.kept:.0f} %",
        "–" if ratio is None else f"{ratio:.2f}",
        f"{100 * scores.top1:.1f} %",
        f"{100 * fidelity.agreement:.1f} %",
        f"{fidelity.kl:.4f}",
    ]
