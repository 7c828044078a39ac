"""Configuration of the evaluate job. Imports no torch, ray, mlflow, pyarrow or PIL."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from pipeline.codec.config import CodecConfig
from pipeline.config import StrictModel
from pipeline.dataflow.cluster import ClusterConfig
from pipeline.features import INCEPTION, PUBLISHED_EXTRACTOR, ExtractorConfig
from pipeline.source.config import ImageConfig, SourceConfig
from pipeline.tracking.config import TrackingConfig


class SamplesConfig(StrictModel):
    """The images to judge."""

    uri: str = Field(..., min_length=1, description="Output of the sample job: a path or fsspec URI.")


class LatentsConfig(StrictModel):
    """The latent dataset the model learned from."""

    uri: str = Field(
        ...,
        min_length=1,
        description="Latent dataset, described in the report. Where it was encoded of the reference, the real images "
        "are those of which it has latents: its plan is read and nothing is listed.",
    )


class RunConfig(StrictModel):
    """The training run."""

    uri: str = Field(..., min_length=1, description="Output of the train job, for its loss curve.")


class ReportConfig(StrictModel):
    """Where the result goes."""

    uri: str = Field(..., min_length=1, description="Receives report.html and evaluation.json.")
    max_bytes: int = Field(
        4 << 20, ge=200_000, description="Largest report.html; pictures are left out before it is exceeded."
    )


class ClassifierConfig(StrictModel):
    """The judge: a small network fitted on labelled real images only."""

    enabled: bool = Field(
        True, description="false: no classifier, hence no accuracy and no figures in its feature space."
    )
    images: int = Field(20_000, ge=16, description="At most this many real images are fitted on.")
    resolution: int | None = Field(
        None, ge=8, le=256, description="Side its inputs are resized to; null: image.resolution, at most 64."
    )
    width: int = Field(24, ge=8, multiple_of=8, description="Channels of the first layer.")
    steps: int = Field(200, ge=1, description="Optimiser steps.")
    batch_size: int = Field(64, ge=1, description="Images a step.")
    learning_rate: float = Field(3e-3, gt=0, description="Peak learning rate of AdamW.")
    holdout: float = Field(
        0.125, gt=0, lt=1, description="Share of the real images, by hash of their key, that only tests it."
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of its weights and batches.")


class FidelityConfig(StrictModel):
    """How the codec's round trip is measured."""

    images: int = Field(1024, ge=1, description="Real images sent through the codec and back.")
    batch_size: int = Field(32, ge=1, description="Images a batch.")


class QualityConfig(StrictModel):
    """How sets of images are compared in feature space."""

    reference_images: int = Field(50_000, ge=2, description="Most real images compared with.")
    vectors: int = Field(5000, ge=100, description="Vectors kept of each set for KID, precision and recall.")
    neighbours: int = Field(3, ge=1, le=50, description="Neighbours that span a manifold (precision, recall).")
    batch_size: int = Field(64, ge=1, description="Images a batch.")


class ClipConfig(StrictModel):
    """The model that says how well images fit their prompts."""

    path: str = Field(..., min_length=1, description="Directory of a CLIPModel in transformers layout.")


class LpipsConfig(StrictModel):
    """The network that compares images with their round trips."""

    net: Literal["alex", "vgg"] = Field("alex", description="The backbone: AlexNet or VGG16.")
    backbone: str = Field(..., min_length=1, description="torchvision's state dict of it: .safetensors or .pth.")
    linear: str = Field(..., min_length=1, description="The linear weights of LPIPS for it: .safetensors or .pth.")


class ThresholdsConfig(StrictModel):
    """What the figures must reach; null asks nothing. A miss is exit code 3, with everything written."""

    accuracy: float | None = Field(None, ge=0, le=1, description="Least share of samples judged right.")
    psnr_db: float | None = Field(None, gt=0, description="Least PSNR of the codec's round trip, dB.")
    ssim: float | None = Field(None, ge=0, le=1, description="Least SSIM of the codec's round trip.")
    precision: float | None = Field(None, ge=0, le=1, description="Least precision.")
    recall: float | None = Field(None, ge=0, le=1, description="Least recall.")
    frechet: float | None = Field(None, ge=0, description="Largest Frechet distance.")
    fid: float | None = Field(None, ge=0, description="Largest published FID (fid: published).")
    kid: float | None = Field(None, description="Largest kernel distance.")
    inception_score: float | None = Field(None, ge=1, description="Least inception score.")
    clip_score: float | None = Field(None, ge=0, le=100, description="Least CLIP score.")
    rfid: float | None = Field(None, ge=0, description="Largest Frechet distance of the codec's round trip.")
    lpips: float | None = Field(None, ge=0, description="Largest LPIPS of the codec's round trip.")


class EvaluateJobConfig(StrictModel):
    """Judge samples and codec against real images: `python -m jobs.evaluate CONFIG... [key=value ...]`."""

    reference: SourceConfig = Field(..., description="The real images, best with labels.")
    image: ImageConfig = Field(..., description="How real images are decoded and sized: as for encode.")
    output: ReportConfig = Field(..., description="Where the result goes.")
    samples: SamplesConfig | None = Field(None, description="The images to judge; null: the codec alone.")
    codec: CodecConfig | None = Field(None, description="The codec whose round trip is measured.")
    data: LatentsConfig | None = Field(None, description="The latent dataset, for the report.")
    train: RunConfig | None = Field(None, description="The training run, for the report.")
    classifier: ClassifierConfig = Field(ClassifierConfig(), description="The judge.")
    fidelity: FidelityConfig = Field(FidelityConfig(), description="The codec's round trip.")
    quality: QualityConfig = Field(QualityConfig(), description="Distances between sets.")
    extractor: ExtractorConfig = Field(ExtractorConfig(), description="The feature space of these distances.")
    fid: Literal["published"] | None = Field(
        None,
        description="published: FID as in the literature, in the space of the TorchScript Inception of 2015-12-05 "
        "(extractor.path). It resizes the images itself, as torchmetrics does with antialias=False. With other "
        "weights the distance is told as frechet and not as fid.",
    )
    clip: ClipConfig | None = Field(None, description="Judges images against their prompts; null: no CLIP score.")
    lpips: LpipsConfig | None = Field(None, description="Judges the codec's round trip; null: no LPIPS.")
    reference_cache: str | None = Field(
        None, min_length=1, description="Keeps the reference's statistics for all reports; null: in output.uri."
    )
    thresholds: ThresholdsConfig = Field(ThresholdsConfig(), description="What must be reached.")
    title: str = Field("Evaluation", min_length=1, max_length=200, description="Heading of the report.")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto",
        description="auto takes a GPU when there is one: of the cluster at RAY_ADDRESS, else of this machine.",
    )
    workers: int | None = Field(
        None,
        ge=1,
        description="Processes that look at images on the cluster at RAY_ADDRESS; null: one beside each GPU, or "
        "where there are none as many as there are CPUs. Without a cluster it is one, this process.",
    )
    cluster: ClusterConfig = Field(ClusterConfig(), description="The Ray cluster, where RAY_ADDRESS names one.")
    tracking: TrackingConfig = Field(TrackingConfig(), description="MLflow tracking.")

    @model_validator(mode="after")
    def _published_fid(self) -> Self:
        if self.fid is None:
            return self
        if self.extractor.path is None:
            raise ValueError(
                f"fid=published needs extractor.path: {INCEPTION}, which comes with no package; a distance in any "
                "other feature space cannot be called FID: leave fid out for it"
            )
        for name, wanted in PUBLISHED_EXTRACTOR.items():
            value = getattr(self.extractor, name)
            if name in self.extractor.model_fields_set and value != wanted:
                raise ValueError(
                    f"fid=published takes extractor.{name}={wanted or 'null'}, got {value}: a distance taken "
                    "otherwise is no published FID; leave one of the two settings out"
                )
        # Said in full wherever the configuration is shown and stored.
        object.__setattr__(self, "extractor", self.extractor.model_copy(update=PUBLISHED_EXTRACTOR))
        return self

    @model_validator(mode="after")
    def _something_to_judge(self) -> Self:
        if self.samples is None and self.codec is None:
            raise ValueError("give samples.uri, codec.path or both: there is nothing to evaluate")
        if len(self.image.resolutions) > 1 or self.image.flip:
            raise ValueError("image: evaluation takes one resolution and no flipped variants")
        return self

    @property
    def classifier_resolution(self) -> int:
        """The side that the classifier's inputs are resized to."""
        return self.classifier.resolution or max(min(self.image.resolutions[0], 64), 8)
