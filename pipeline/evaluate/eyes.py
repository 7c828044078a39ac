"""What looks at images: the classifier fitted here, and the networks given from outside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.evaluate.classifier import Classifier
from pipeline.evaluate.clip import ClipScorer
from pipeline.evaluate.extractor import Extractor
from pipeline.evaluate.lpips import Lpips

Images = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Sight:
    """What was seen in a batch: labels [n], features [n, d], class probabilities [n, k]; None where nobody looks."""

    labels_N: npt.NDArray[np.int64] | None
    features_ND: Floats | None
    probabilities_NK: Floats | None


@dataclass(frozen=True)
class Eyes:
    """`judge` sees classes; features come from `extractor` where one is given, else from the judge."""

    judge: Classifier | None = None
    extractor: Extractor | None = None
    clip: ClipScorer | None = None
    lpips: Lpips | None = None

    def look(self, images_NHWC: Images) -> Sight:
        """Everything about a batch of uint8 images [n, h, w, 3], each network asked once."""
        labels = features = probabilities = None
        if self.judge is not None:
            labels, features, probabilities = self.judge.look(images_NHWC)
        if self.extractor is not None:
            features, probabilities = self.extractor(images_NHWC)
        return Sight(labels, features, probabilities)

    @property
    def space_digest(self) -> str | None:
        """Names the feature space; None when there is none."""
        if self.extractor is not None:
            return self.extractor.digest
        return None if self.judge is None else self.judge.digest

    @property
    def space_name(self) -> str:
        """The feature space in words."""
        if self.extractor is not None:
            return f"in the feature space of {self.extractor.name} (sha256 {self.extractor.digest[:12]})"
        return "in the feature space of the classifier fitted here (not Inception)"

    def contract(self) -> dict[str, Any]:
        """What figures depend on, of the networks from outside."""
        out: dict[str, Any] = {} if self.extractor is None else dict(self.extractor.contract)
        if self.lpips is not None:
            out |= {"lpips_net": self.lpips.net, "lpips_sha256": self.lpips.digest}
        return out
