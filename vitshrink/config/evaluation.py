"""Which samples a result is judged on, and the bounds it has to keep."""

from dataclasses import dataclass

from vitshrink.config.data import DataConfig, columns_of
from vitshrink.config.fields import DATA, GATES, Options, option


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions(Options):
    """Samples to evaluate on."""

    eval: str | None = option(None, "Data to evaluate on.", panel=DATA, changes="report", in_memory=False)
    eval_split: str | None = option(
        None, "Split of the evaluation data.", panel=DATA, changes="report", in_memory=False
    )
    eval_texts: str | None = option(
        None,
        "Texts for evaluation of CLIP and SigLIP, if the images have neither captions nor classes.",
        panel=DATA,
        changes="report",
        in_memory=False,
    )
    eval_limit: int | None = option(
        None, "Maximum number of evaluation samples.", panel=DATA, low=1, changes="report", in_memory=False
    )
    eval_labels: str | None = option(
        None,
        "File with the classes of a flat image folder, as lines of `image class`.",
        panel=DATA,
        changes="report",
        in_memory=False,
    )


@dataclass(frozen=True, kw_only=True)
class EvaluationColumnOptions(Options):
    """Columns of the evaluation data, in a job that reads other data too."""

    eval_image_column: str | None = option(
        None, "Image column of the evaluation data.", panel=DATA, changes="report", in_memory=False
    )
    eval_text_column: str | None = option(
        None, "Text column of the evaluation data.", panel=DATA, changes="report", in_memory=False
    )
    eval_text_pair_column: str | None = option(
        None, "Second text column of the evaluation data.", panel=DATA, changes="report", in_memory=False
    )
    eval_label_column: str | None = option(
        None, "Label column of the evaluation data.", panel=DATA, changes="report", in_memory=False
    )


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

    min_accuracy: float | None = option(
        None, "Exit with code 3 if the accuracy is lower than this, in percent.", panel=GATES
    )
    max_drop: float | None = option(
        None, "Exit with code 3 if the accuracy drops by more points than this.", panel=GATES
    )
    max_changed: float | None = option(
        None, "Exit with code 3 if more than this percentage of predictions differ from the baseline.", panel=GATES
    )
    max_kl: float | None = option(
        None, "Exit with code 3 if the KL divergence is larger than this, in nats.", panel=GATES
    )
    max_error: float | None = option(
        None, "Exit with code 3 if the relative error of scores or features is larger than this.", panel=GATES
    )
    max_size: str | None = option(
        None, "Exit with code 3 if the weight files are larger than this, e.g. 90MB.", panel=GATES
    )
    max_latency_ratio: float | None = option(
        None, "Exit with code 3 if the latency is larger than this fraction of the baseline's.", panel=GATES
    )
