"""What an evaluation measures, and how people are told."""

from typing import NamedTuple


class Measure(NamedTuple):
    """The name of a measure, its unit, and what it tells."""

    title: str
    unit: str
    caption: str = ""
    short: str = ""  # for tables and axes, where it differs from the title
    kept: bool = False  # whether falling is forgetting

    @property
    def name(self) -> str:
        """For the middle of a sentence."""
        return self.short or self.title[0].lower() + self.title[1:]

    @property
    def label(self) -> str:
        """With the unit, for an axis or a line of a table."""
        return f"{self.name} ({self.unit})"


# By the names that the trainer's results have.
MEASURES = {
    "eval_loss": Measure("Held-out loss", "nats per answer token"),
    "retain_loss": Measure(
        "Retained-text loss", "nats per token", "Rising is forgetting."
    ),
    "kl": Measure(
        "KL from the pretrained model",
        "nats per token",
        "On the retained text. Rising is forgetting.",
        short="KL",
    ),
    "knowledge": Measure(
        "Knowledge kept",
        "share of the questions right",
        "Of questions with several choices. Falling is forgetting.",
        kept=True,
    ),
    "answers": Measure(
        "Short answers right",
        "share of the questions",
        "Of questions that the model answers in words. Falling is forgetting.",
        kept=True,
    ),
    "instructions": Measure(
        "Instructions obeyed",
        "share of the checks",
        "Of requests in chat form. Falling is forgetting.",
        kept=True,
    ),
    "distance": Measure(
        "Distance from the pretrained weights", "Euclidean norm", "Of all parameters."
    ),
    "touched": Measure(
        "Entries ever touched", "share of all entries", "Changed by training."
    ),
}
