"""Which samples a result is judged on, and the bounds it has to keep."""

from dataclasses import dataclass

from vitshrink.config.data import DataConfig, columns_of
from vitshrink.config.fields import DATA, GATES, Options, option


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions(Options):
    """Samples to evaluate on."""

    eval: str | None = option(None, "Samples to evaluate on.", panel=DATA, changes="report", in_memory=False)
    eval_split: str | None = option(None, "Its split.", panel=DATA, changes="report", in_memory=False)
    eval_texts: str | None = option(
        None,
        "Texts beside them, for CLIP and SigLIP, where images have neither captions nor classes.",
        panel=DATA,
        changes="report",
        in_memory=False,
    )
    eval_limit: int | None = option(
        None, "Evaluate on this many at most.", panel=DATA, low=1, changes="report", in_memory=False
    )
    eval_labels: str | None = option(
        None,
        "File with the classes of a flat folder: `image class` lines.",
        panel=DATA,
        changes="report",
        in_memory=False,
    )


@dataclass(frozen=True, kw_only=True)
class EvaluationColumnOptions(Options):
    """Columns of the evaluation data, in a job that reads other data too."""

    eval_image_column: str | None = option(None, "Its column of images.", panel=DATA, changes="report", in_memory=False)
    eval_text_column: str | None = option(None, "Its column of texts.", panel=DATA, changes="report", in_memory=False)
    eval_text_pair_column: str | None = option(
        None, "Its column of second texts.", panel=DATA, changes="report", in_memory=False
    )
    eval_label_column: str | None = option(None, "Its column of labels.", panel=DATA, changes="report", in_memory=False)


@dataclass(frozen=True, kw_only=True)
class SeparateEvaluationOptions(EvaluationColumnOptions, EvaluationOptions):
    """Samples to evaluate on beside those that the job learns from."""

    @property
    def eval_data(self) -> DataConfig | None:
        if self.eval is None:
            return None
        columns = columns_of(self, "eval_")
        return DataConfig(
            self.eval, self.eval_split, **columns, labels=self.eval_labels, flags="--eval-", texts=self.eval_texts
        )


@dataclass(frozen=True, kw_only=True)
class GateOptions(Options):
    """Bounds on a result; a missed one is exit code 3."""

    min_accuracy: float | None = option(None, "Exit with 3 below this accuracy, in percent.", panel=GATES)
    max_drop: float | None = option(None, "Exit with 3 when more points of accuracy are lost.", panel=GATES)
    max_changed: float | None = option(
        None, "Exit with 3 when more percent of the predictions differ from the baseline's.", panel=GATES
    )
    max_kl: float | None = option(None, "Exit with 3 when the divergence is larger.", panel=GATES)
    max_error: float | None = option(
        None, "Exit with 3 when the relative error of scores or features is larger.", panel=GATES
    )
    max_size: str | None = option(None, "Exit with 3 when the files are larger, e.g. 90MB.", panel=GATES)
    max_latency_ratio: float | None = option(
        None, "Exit with 3 when a pass takes longer than this fraction of the baseline's.", panel=GATES
    )
