"""What the samples of a head look like that reads more than a text and a label: how they lie in rows.

A new one is one file here, with its encoder, and an entry in ``LAYOUTS``.
"""

from collections.abc import Mapping

from vitshrink.data.layouts.answers import QUESTIONS
from vitshrink.data.layouts.choices import CHOICES
from vitshrink.data.layouts.layout import Layout
from vitshrink.data.layouts.words import WORDS

LAYOUTS: Mapping[str, Layout] = {
    "token-classification": WORDS,
    "question-answering": QUESTIONS,
    "multiple-choice": CHOICES,
}
"""By task; the others read an image, a text or a pair of texts, and one label."""

__all__ = ["LAYOUTS", "Layout"]
