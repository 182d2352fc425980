"""What an evaluation finds: how good the models are, how alike, and whether the difference is real.

Fractions are in [0, 1], divergences in nats, intervals at 95 %.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, NamedTuple, final

from vitshrink.runtime.records import IfSet, LeftOut, plain


class Interval(NamedTuple):
    """A 95 % interval, written as ``[low, high]``."""

    low: float
    high: float


class Quality:
    """How good one model is, by the metric that fits its head."""

    metric: ClassVar[str]
    """The figure that models are compared by."""
    interval: Interval
    """Of that."""

    def score(self, metric: str | None) -> float | None:
        """The figure of this name; None where this quality has none."""
        value: float | None = None if metric is None else getattr(self, metric, None)
        return value


@final
@dataclass(frozen=True)
class Accuracy(Quality):
    """Accuracy of a classifier, or of a masked language model at its hidden tokens."""

    metric: ClassVar[str] = "top1"

    top1: float
    """Fraction of the samples, hidden tokens or words with a correct prediction."""
    correct: int
    """Number of these."""
    interval: Interval
    """Of ``top1``."""
    top5: IfSet[float] = None
    """Fraction whose class is among the five most likely; only with more than five classes."""
    top5_correct: IfSet[int] = None
    """Number of these."""
    top5_interval: IfSet[Interval] = None
    """Of ``top5``."""
    tokens: IfSet[int] = None
    """Number of hidden tokens of masked language models, or of words of token classifiers; only for these."""


@final
@dataclass(frozen=True)
class LabelScores(Quality):
    """How well a multi-label classifier finds the labels."""

    metric: ClassVar[str] = "f1_micro"

    f1_micro: float
    """F1 over all labels of all samples together."""
    interval: Interval
    """Of ``f1_micro``."""
    f1_macro: float
    """Mean of the F1 of each label."""
    exact_match: float
    """Fraction of the samples whose labels are all right."""
    exact_match_interval: Interval
    """Of ``exact_match``."""


@final
@dataclass(frozen=True)
class EntityScores(Quality):
    """How well a token classifier finds entities, whose tags are those of IOB2."""

    metric: ClassVar[str] = "entity_f1"

    entity_f1: float
    """F1 of the entities of all samples together: an entity is right where its kind and all its words are."""
    interval: Interval
    """Of ``entity_f1``."""
    entity_precision: float
    """Fraction of the entities found that are right."""
    entity_recall: float
    """Fraction of the true entities that are found."""
    entities: int
    """Number of true entities."""
    token_accuracy: float
    """Fraction of the words whose tag is right."""
    token_accuracy_interval: Interval
    """Of ``token_accuracy``."""
    tokens: int
    """Number of words."""


@final
@dataclass(frozen=True)
class AnswerScores(Quality):
    """How well questions are answered by a part of a text, by the rules of SQuAD."""

    metric: ClassVar[str] = "answer_f1"

    answer_f1: float
    """Mean F1 of the words that an answer shares with a true one."""
    interval: Interval
    """Of ``answer_f1``."""
    answer_exact: float
    """Fraction of the answers that are a true one."""
    answer_exact_interval: Interval
    """Of ``answer_exact``."""


@final
@dataclass(frozen=True)
class Correlation(Quality):
    """Correlation of the outputs of a regression, or of the similarities of sentences, with the true scores."""

    metric: ClassVar[str] = "spearman"

    spearman: float | None
    """Rank correlation in [-1, 1]; None if one side is constant."""
    pearson: float | None
    """Linear correlation in [-1, 1]; null if one side is constant."""
    interval: Interval
    """Of ``spearman``."""


@final
@dataclass(frozen=True)
class Ranking(Quality):
    """How well the passages of queries are ranked, by a cross-encoder or by the similarity of embeddings."""

    metric: ClassVar[str] = "ndcg_at_10"

    ndcg_at_10: float
    """Mean normalized discounted cumulative gain of the first ten passages."""
    interval: Interval
    """Of ``ndcg_at_10``."""
    queries: int
    """Number of queries with a relevant passage."""


@final
@dataclass(frozen=True)
class Retrieval(Quality):
    """How well a dual encoder finds the texts of images, and the images of texts."""

    metric: ClassVar[str] = "recall_at_1"

    recall_at_1: float
    """Mean of ``text_at_1`` and ``image_at_1``."""
    interval: Interval
    """Of ``recall_at_1``."""
    text_at_1: float
    """Fraction of the pairs whose image has a text of its own nearest to it."""
    text_at_5: float
    """Among the five nearest."""
    text_at_10: float
    """Among the ten nearest."""
    image_at_1: float
    """Fraction of the pairs whose text has an image of its own nearest to it."""
    image_at_5: float
    """Among the five nearest."""
    image_at_10: float
    """Among the ten nearest."""


@final
@dataclass(frozen=True)
class Fidelity:
    """How alike the compressed and the dense model are. A head has some of these figures; the others are left out."""

    agreement: IfSet[float] = None
    """Fraction of the samples, hidden tokens or words with the same prediction."""
    agreement_interval: IfSet[Interval] = None
    """Of ``agreement``."""
    kl: IfSet[float] = None
    """Mean KL(dense ‖ compressed), nats."""
    kl_interval: IfSet[Interval] = None
    """Of ``kl``."""
    top5_overlap: IfSet[float] = None
    """Mean fraction of the five most likely classes that both models share."""
    label_agreement: IfSet[float] = None
    """Fraction of single labels with the same decision, for multi-label classifiers."""
    entity_agreement: IfSet[float] = None
    """F1 of the compressed model's entities, those of the dense one taken for true; by token classifiers."""
    feature_cosine: IfSet[float] = None
    """Mean cosine of the features, token by token."""
    pooled_cosine: IfSet[float] = None
    """Mean cosine of the pooled features."""
    neighbor_agreement: IfSet[float] = None
    """Mean fraction of the ten samples nearest to a sample that both models name, by their pooled features."""
    nearest_kept: IfSet[float] = None
    """Fraction of the samples whose nearest one by the dense model is among the ten nearest by the compressed one."""
    prediction_spearman: Annotated[float | None, LeftOut(beside="mean_absolute_difference")] = None
    """Rank correlation of the two models' scores; None where one side is constant."""
    mean_absolute_difference: IfSet[float] = None
    """Mean absolute difference of the two models' scores, in their unit."""
    relative_error: IfSet[float] = None
    """Squared error of scores or features, as a fraction of their spread in the dense model."""
    relative_error_interval: IfSet[Interval] = None
    """Of ``relative_error``."""


@final
@dataclass(frozen=True)
class Difference:
    """The dense against the compressed model on the same samples, by the metric."""

    drop: float | None
    """Dense score minus compressed score; None if one of them is not a number."""
    drop_interval: Interval
    """Of ``drop``."""
    p_value: float
    """Probability of a difference at least as large if the models are equally good."""
    significant: bool
    """Whether the p-value is below 0.05."""
    test: str
    """The test that gave the p-value."""


@final
@dataclass(frozen=True)
class ClassScore:
    """One class, one label or one kind of entity: accuracy, or F1, of the models that were run."""

    class_: str
    """Its name."""
    samples: int
    """Number of its samples."""
    dense: IfSet[float] = None
    """Score of the dense model."""
    compressed: IfSet[float] = None
    """Score of the compressed model."""

    @property
    def gain(self) -> float:
        """Compressed less dense score; a model that was not run counts as zero."""
        return (self.compressed or 0.0) - (self.dense or 0.0)


@final
@dataclass(frozen=True)
class Disagreement:
    """A sample that the two models classify differently."""

    sample: str
    """Key of the sample; for images the path below the data folder."""
    label: str | None
    """True class; None without labels."""
    dense: str | None
    """Prediction of the dense model."""
    compressed: str | None
    """Prediction of the compressed model."""
    kl: float
    """KL(dense ‖ compressed), nats."""
    thumbnail: IfSet[str] = None
    """Small image as a ``data:`` address; only if the user asked for thumbnails."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was measured. A model that was not run and a comparison that could not be made are None."""

    task: str
    """``image-classification``, ``text-classification``, ``token-classification``, ``question-answering``,
    ``multiple-choice``, ``masked-lm``, ``features``, ``similarity`` (of pairs) or ``image-text``."""
    metric: str | None = None
    """The figure of ``dense`` and ``compressed`` that ``difference`` compares: ``top1``, ``f1_micro``, ``entity_f1``,
    ``answer_f1``, ``spearman``, ``ndcg_at_10``, ``recall_at_1``."""
    samples: int
    """Number of samples."""
    dense: Accuracy | LabelScores | EntityScores | AnswerScores | Correlation | Ranking | Retrieval | None = None
    """Scores of the dense model."""
    compressed: Accuracy | LabelScores | EntityScores | AnswerScores | Correlation | Ranking | Retrieval | None = None
    """Scores of the compressed model."""
    fidelity: Fidelity | None = None
    """Similarity of the two models."""
    difference: Difference | None = None
    """The drop from dense to compressed, and whether it is significant."""
    classes: tuple[ClassScore, ...] = ()
    """Accuracy of each class, or F1 of each label or kind of entity, the most samples lost first. Without labels, the
    dense model's choice takes their place."""
    disagreements: tuple[Disagreement, ...] = ()
    """The largest divergence first, 24 at most."""

    @property
    def score(self) -> float | None:
        """That of the compressed model by the metric, or of the dense one where it ran alone."""
        quality = self.compressed or self.dense
        return None if quality is None else quality.score(self.metric)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        entries: dict[str, Any] = plain(self)
        return entries


@final
@dataclass(frozen=True, kw_only=True)
class EvaluationRecord(Evaluation):
    """An evaluation and its data."""

    source: str | None = None
    """Source of the samples, as the user named it."""
    fingerprint: str | None = None
    """SHA-256 of the contents of the samples, in their order."""
    label_rule: str | None = None
    """How labels were matched to the model's classes; None without labels."""
    pooling: str | None = None
    """How the tokens of a sample become one vector, if the models have no head."""
    similarity: str | None = None
    """How two vectors are compared, if the samples are pairs."""
    bad_samples: Mapping[str, str] = field(default_factory=dict)
    """Unusable samples, with the reason."""
    preprocessing: Mapping[str, Any] | None = None
    """What the image processor or the tokenizer did to a sample."""
