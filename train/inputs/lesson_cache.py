"""What the teacher says of each row, computed once (train/inputs/shards.py): its weights do not change in a run.

Of every supervised position of a row that answers an image, the teacher's likeliest tokens; what is left over is one
mass (train/step/teacher.py, `TopTokens`). A lesson belongs to a row's content, whatever the student's budget: runs
with other budgets, frozen layers, tunings and weights of the divergence have the same lessons.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from shortzip.data.dataset import ConversationDataset, Sample
from shortzip.data.images import BadImage, ImageSource, image_name
from shortzip.data.supervision import IGNORE_INDEX
from shortzip.train.inputs.feature_cache import known_key
from shortzip.train.inputs.shards import Shards

FORMAT = 1  # of lessons, and of what data/images.py makes of a file: to be raised when either changes
TOP_TOKENS = 64
_PARTS = ("log_probs", "ids")


def tokens_kept(vocabulary: int) -> int:
    """How many of the likeliest tokens are kept: fewer than there are, so that some are left over."""
    return min(TOP_TOKENS, vocabulary - 1)


def lessons_identity(
    release: Mapping[str, str], model: Any, processor: Any, temperature: float, load_in_4bit: bool
) -> dict[str, Any]:
    """Everything but the row that its lesson depends on.

    Args:
        release: what `release_identity` gives.
        model: it, in the dtype that it is computed in.
        processor: its processor, whatever its budget.
    """
    images = processor.image_processor
    return {
        "format": FORMAT,
        "release": dict(release),
        "dtype": str(model.get_input_embeddings().weight.dtype),
        "language model in 4 bits": load_in_4bit,
        "temperature": float(temperature),
        "top tokens": tokens_kept(model.config.text_config.vocab_size),
        "processor": {"class": type(images).__name__, **json.loads(images.to_json_string())},
    }


class LessonCache(Shards):
    """Lessons by row."""

    WHAT = "rows"

    def find(self, sample: Sample, images: Sequence[ImageSource], dataset: ConversationDataset) -> dict[str, Tensor]:
        """`taught_log_probs` [S, k] float32 and `taught_ids` [S, k] int32 at the row's supervised positions.

        Empty for a row that answers no image. Raises `BadImage` for one that has no lesson, and `DamagedShard`.
        """
        if not answers(sample, dataset):
            return {}
        key = row_key(sample, images, dataset)
        if key not in self:
            problem = "has changed since its row's lesson was stored: start anew"
            raise BadImage("unreadable_image", image_name(images[0]), problem)
        held = self.tensors(key)
        return {f"taught_{name}": held[name] for name in _PARTS}


def answers(sample: Sample, dataset: ConversationDataset) -> bool:
    """Whether a row has a supervised position after a visual token."""
    ids, image = sample.encoded.input_ids, dataset.supervision.processor.image_token_id
    return image in ids and any(label != IGNORE_INDEX for label in sample.encoded.labels[ids.index(image) + 1 :])


def row_key(sample: Sample, images: Sequence[ImageSource], dataset: ConversationDataset) -> str:
    """SHA-256 of a row's content: its tokens with one in the place of each image, their labels, its images' bytes.

    Neither the budget nor where files lie counts. Raises `BadImage` if an image cannot be read.
    """
    ids, labels = sample.encoded.input_ids, sample.encoded.labels
    image, supervision = dataset.supervision.processor.image_token_id, dataset.supervision
    counts = iter([supervision.placeholders(size) for size in sample.image_sizes])
    row, place = [], 0
    while place < len(ids):
        row.append((ids[place], labels[place]))
        place += next(counts) if ids[place] == image else 1
    keys = [known_key(dataset.known_images, source, dataset.image_root) for source in images]
    return hashlib.sha256(json.dumps([row, keys]).encode()).hexdigest()
