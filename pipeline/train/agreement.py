"""Do the datasets of a mixture belong together? Every refusal names the two that do not. Torch-free.

One model learns one latent space and one kind of condition, so what decides what a latent means must agree: the
codec, the posterior, classes in all or in none, one text encoder. What is seen through it may differ: sizes and
crops ("image" of the fingerprint), and the number formats of encoding and storing.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

from pipeline.errors import ConfigError, ConflictError
from pipeline.store.ledger.identity import differences
from pipeline.store.read.dataset import LatentDataset
from pipeline.stream.mixture import shares_of
from pipeline.train.config import TrainJobConfig

_MAY_DIFFER = ("image", "codec_dtype", "latent_dtype")

Datasets = Mapping[str, LatentDataset]  # by the key of their sections, see `DataConfig.parts`


def check_mixture(config: TrainJobConfig, datasets: Datasets) -> None:
    """ConfigError or ConflictError when weights cannot be served, a dataset comes twice or latents differ."""
    shares_of([part.weight for part in config.data.parts.values()], len(datasets))
    for (key, one), (other_key, other) in combinations(datasets.items(), 2):
        if one.digest == other.digest:
            raise ConfigError(
                f"{other_key} holds the same rows as {key}: {other.uri} and {one.uri} (digest {one.digest})",
                key=f"{other_key}.uri",
                value=other.uri,
                # Each serves its own epochs: a sample would meet the same noise twice, and count twice.
                rule="a mixture serves each dataset once",
                next_step="leave one of them out, and add its weight to the other's",
            )
    (first, *others) = datasets
    for key in others:
        _check_latents(key, datasets[first], datasets[key])


def common_classes(config: TrainJobConfig, datasets: Datasets) -> int | None:
    """Classes that cover all datasets; None where labels are ignored or absent; ConfigError where only some are."""
    if not config.train.conditional:
        return None
    counts = {key: dataset.num_classes for key, dataset in datasets.items()}
    for key, dataset in datasets.items():
        without, rows = dataset.num_unlabelled
        if 0 < without < rows:
            raise ConfigError(
                f"{without:,} of the {rows:,} rows of {dataset.uri} have no label, the others have one",
                key=f"{key}.uri",
                value=dataset.uri,
                rule="all rows of a dataset have labels, or labels are ignored",
                next_step="set train.conditional=false to ignore them, or label all rows and encode again",
            )
    labelled = [key for key, count in counts.items() if count is not None]
    bare = [key for key, count in counts.items() if count is None]
    if labelled and bare:
        raise ConfigError(
            f"Every row of {datasets[labelled[0]].uri} has a label, and rows of {datasets[bare[0]].uri} have none",
            key=f"{bare[0]}.uri",
            value=datasets[bare[0]].uri,
            rule="datasets that are mixed all have labels, or their labels are ignored",
            next_step="set train.conditional=false to ignore them, or leave one of the datasets out",
        )
    return max((count for count in counts.values() if count is not None), default=None)


def check_text_uris(config: TrainJobConfig) -> None:
    """ConfigError when only some of the datasets have embeddings."""
    parts = config.data.parts
    told = [key for key, part in parts.items() if part.text_uri is not None]
    mute = [key for key, part in parts.items() if part.text_uri is None]
    if told and mute:
        raise ConfigError(
            f"The captions of {parts[told[0]].uri} are embedded, those of {parts[mute[0]].uri} are not",
            key=f"{mute[0]}.text_uri",
            value="null",
            rule="text is learned from all datasets of a mixture or from none",
            next_step=f"run jobs.embed_text on {parts[mute[0]].uri} and name what it wrote, or set "
            f"{told[0]}.text_uri=null",
        )


def check_same_encoder(config: TrainJobConfig, texts: Mapping[str, dict[str, Any]]) -> None:
    """ConflictError when embeddings (`handshake.text_facts`, by key) were made by different encoders."""
    (first, *others) = texts
    for key in others:
        found = list(differences(texts[first]["fingerprint"], texts[key]["fingerprint"]))
        if found:
            raise ConflictError(
                f"The embeddings at {texts[first]['uri']} and {texts[key]['uri']} were made in different ways:\n"
                + _shown(found),
                key=f"{key}.text_uri",
                value=config.data.parts[key].text_uri,
                rule="all datasets of a mixture share one text encoder and its settings",
                next_step="run jobs.embed_text on one of the datasets with the other's encoder",
            )


def _check_latents(key: str, one: LatentDataset, other: LatentDataset) -> None:
    found = list(differences(_meaning(one), _meaning(other)))
    if found:
        raise ConflictError(
            f"The latents of {one.uri} and {other.uri} mean different things:\n" + _shown(found),
            key=f"{key}.uri",
            value=other.uri,
            rule="mixed datasets have one codec and one posterior; sizes, crops and number formats may differ",
            next_step="encode the images of one of them with the settings of the other, or leave it out",
        )


def _meaning(dataset: LatentDataset) -> dict[str, Any]:
    """What decides what a latent is: the fingerprint but for what may differ, and the latent's shape."""
    shape = {name: dataset.codec[name] for name in ("latent_channels", "factor")}
    return {**{k: v for k, v in dataset.fingerprint.items() if k not in _MAY_DIFFER}, **shape}


def _shown(found: list[tuple[str, str, str]]) -> str:
    return "\n".join(f"    {name}: {one} in the first, {other} in the second" for name, one, other in found[:20])
