"""Does this dataset fit this model and this run? Answered before anything is started; torch-free.

Every refusal names both sides. What is compared on a resume is kept by `identity` in each checkpoint.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.diffusion.solvers import COMBINATIONS, Combination, combination, combination_shares
from pipeline.errors import ConfigError, ConflictError, argument_keys
from pipeline.model.config import InstalledConfig, PublishedConfig, installed_network, kinds_for
from pipeline.store.ledger.identity import differences
from pipeline.store.read.dataset import LatentDataset
from pipeline.store.read.pins import Pins
from pipeline.stream.data import Where, layout_of
from pipeline.stream.mixture import FOREVER, phases_of
from pipeline.stream.order import Order, OrderSpec
from pipeline.text.dataset import TextEmbeddings
from pipeline.train.config import DistanceConfig, GridConfig, MixConfig, TrainJobConfig
from pipeline.train.start import (
    Start,
    check_arrangement,
    check_start_fits,
    license_of,
    locate_codec,
    scale_of,
    text_facts,
)

# -- Do the datasets of a mixture belong together? Every refusal names the two that do not. Torch-free ---------
#
# One model learns one latent space and one kind of condition, so what decides what a latent means must agree: the
# codec, the posterior, classes in all or in none, one text encoder. What is seen through it may differ: sizes and
# crops ("image" of the fingerprint), and the number formats of encoding and storing.


_MAY_DIFFER = ("image", "codec_dtype", "latent_dtype")

Datasets = Mapping[str, LatentDataset]  # by the key of their sections, see `DataConfig.parts`


def check_mixture(config: TrainJobConfig, datasets: Datasets) -> None:
    """ConfigError or ConflictError when weights or steps cannot be served, one comes twice or latents differ."""
    parts = config.data.parts.values()
    with argument_keys({"weights": "data.mix", "steps": "data.until_images"}):
        phases_of([part.weight for part in parts], [steps_of(part, config.train.batch_size) for part in parts])
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
        one, other = datasets[first], datasets[key]
        differing = list(differences(_meaning(one), _meaning(other)))
        if differing:
            raise ConflictError(
                f"The latents of {one.uri} and {other.uri} mean different things:\n" + _shown(differing),
                key=f"{key}.uri",
                value=other.uri,
                rule="mixed datasets have one codec and one posterior; sizes, crops and number formats may differ",
                next_step="encode the images of one of them with the settings of the other, or leave it out",
            )


def steps_of(part: MixConfig, batch_size: int) -> tuple[int, int]:
    """The steps in which a dataset is served, see `stream.mixture.Part`."""
    end = FOREVER if part.until_images is None else -(-part.until_images // batch_size)
    return -(-part.from_images // batch_size), end


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
    embedded = [key for key, part in parts.items() if part.text]
    bare = [key for key, part in parts.items() if not part.text]
    if embedded and bare:
        raise ConfigError(
            f"The captions of {parts[embedded[0]].uri} are embedded, those of {parts[bare[0]].uri} are not",
            key=f"{bare[0]}.text",
            value="[]",
            rule="text is learned from all datasets of a mixture or from none",
            next_step=f"run jobs.embed_text on {parts[bare[0]].uri} and name what it wrote, or set "
            f"{embedded[0]}.text=[]",
        )


def check_same_encoders(texts: Mapping[str, Sequence[dict[str, Any]]]) -> None:
    """ConflictError when embeddings (`text_facts`, by key) were made by different encoders."""
    (first, *others) = texts
    for key in others:
        made, other = ([text["fingerprint"] for text in texts[name]] for name in (first, key))
        differing = [
            each
            for at in range(max(len(made), len(other)))
            for each in differences(*(each[at] if at < len(each) else "absent" for each in (made, other)))
        ]
        if differing:
            raise ConflictError(
                f"The embeddings at {_uris(texts[first])} and {_uris(texts[key])} were made in different ways:\n"
                + _shown(differing),
                key=f"{key}.text",
                value=_uris(texts[key]),
                rule="all datasets of a mixture share one text encoder and its settings",
                next_step="run jobs.embed_text on one of the datasets with the other's encoder",
            )


def _uris(texts: Sequence[dict[str, Any]]) -> str:
    return ", ".join(str(text["uri"]) for text in texts)


def _meaning(dataset: LatentDataset) -> dict[str, Any]:
    """What decides what a latent is: the fingerprint but for what may differ, and the latent's shape."""
    shape = {name: dataset.codec[name] for name in ("latent_channels", "factor")}
    return {**{k: v for k, v in dataset.fingerprint.items() if k not in _MAY_DIFFER}, **shape}


def _shown(differing: list[tuple[str, str, str]]) -> str:
    return "\n".join(f"    {name}: {one} in the first, {other} in the second" for name, one, other in differing[:20])


@dataclass(frozen=True)
class Facts:
    """What the dataset is, as far as the model is concerned."""

    latent_channels: int
    factor: int
    num_classes: int | None
    moments: bool
    buckets: tuple[str, ...]  # the most frequent first
    codec: dict[str, Any] | None  # path, revision, kind: where it lies now; None when nobody knows
    texts: tuple[dict[str, Any], ...] = ()  # see `text_facts`, one for each text encoder
    text_dim: int | None = None  # width of a text state as the model reads it; None when no text is learned from
    layouts: tuple[str, ...] = ()  # digests of the rows and their places, by dataset
    init: dict[str, Any] | None = None  # see `Start.init`
    scale: dict[str, list[float]] | None = None  # see `scale_of`
    license: str | None = None  # of the weights that it starts from
    zero_empty_text: bool = False  # see `ModelInfo`
    shift_by_size: dict[str, Any] | None = None  # the fields of a `SizeShift`, of the weights that it starts from
    lora: dict[str, Any] | None = None  # the fields of a `Lora`; None where all weights are trained

    @property
    def text_length(self) -> int:
        """Most states of a text."""
        return sum(int(text["max_length"]) for text in self.texts)

    @property
    def latent_sizes(self) -> dict[str, tuple[int, int]]:
        """Height and width of the latents of each bucket, the most frequent first."""
        sides = {bucket: bucket.split("x") for bucket in self.buckets}
        return {bucket: (int(h) // self.factor, int(w) // self.factor) for bucket, (h, w) in sides.items()}

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of the latents of the most frequent bucket."""
        return self.latent_sizes[self.buckets[0]]

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Facts:
        """The inverse of `dataclasses.asdict`, after a way through JSON."""
        return cls(**{**values, **{name: tuple(values[name]) for name in ("buckets", "layouts", "texts")}})


# What a stream calls its arguments, and a configuration of a training its keys.
CACHE = "cache"  # below output.uri: what was counted once about the dataset
STREAM_KEYS = {
    "batch_size": "train.batch_size",
    "world_size": "train.num_workers",
    "weights": "data.mix",
    "share": "stream.holdout",
    "captions": "data.captions",
    **{name: f"stream.{name}" for name in ("lanes", "window_bytes")},
}


def check_batches(config: TrainJobConfig, datasets: Datasets) -> None:
    """ConfigError where a dataset, even with what is held out of it, gives no batch, or its windows do not fit.

    Of several datasets the memory of each is known when they are mixed.
    """
    s = config.stream
    window_bytes = s.window_bytes if len(datasets) == 1 else sys.maxsize
    spec = OrderSpec(config.train.seed, config.train.batch_size, s.lanes, window_bytes, s.shuffle)
    for key, dataset in datasets.items():
        try:
            with argument_keys(STREAM_KEYS):
                Order(layout_of(dataset), spec)
        except ConfigError as error:
            raise error.but(what=f"{error.what}: {key}.uri={dataset.uri}") from None


def handshake(start: Start, dataset: LatentDataset, *mix: LatentDataset, pins: Pins | None = None) -> Facts:
    """The facts of a dataset that fits; ConfigError or ConflictError, naming both sides, of one that does not.

    mix: the datasets of `data.mix`, in order; the facts are then those of all together. pins: where the states of
    their embeddings may be kept.
    """
    config = start.config
    datasets = dict(zip(config.data.parts, (dataset, *mix), strict=True))
    for key, part in config.data.parts.items():
        if part.where is not None:
            with argument_keys({"where": f"{key}.where"}):
                Where(part.where)
    for key, each in datasets.items():
        channels, stored = int(each.codec["latent_channels"]), len(each.channel_mean)
        if stored != channels * (2 if each.posterior == "moments" else 1):
            raise ConflictError(
                f"The dataset holds {stored} channels a row, its codec makes {channels} "
                f"(posterior: {each.posterior})",
                key=f"{key}.uri",
                value=each.uri,
                rule="stored latents have the codec's channels, twice for moments",
                next_step="verify the dataset with jobs.verify",
            )
    check_mixture(config, datasets)
    check_batches(config, datasets)
    num_classes, codec = common_classes(config, datasets), locate_codec(config.codec, dataset.codec)
    its_texts = _texts_of(config, datasets, pins)
    check_start_fits(start, dataset, its_texts)
    network, text_dim = config.model, int(its_texts[0]["width"]) if its_texts else None
    info = None if start.weights is None else start.weights.info
    theirs = None if info is None else info.num_classes
    if isinstance(network, PublishedConfig):
        theirs, text_dim = network.num_classes, network.text_dim if its_texts else None
    num_classes = _all_classes(config, num_classes, theirs)
    # All buckets, those of which most rows are served first, then by name.
    shares: Counter[str] = Counter()
    for key, part in config.data.parts.items():
        groups = datasets[key].row_groups
        rows = np.bincount(groups.bucket_of, weights=groups.rows, minlength=len(groups.buckets))
        for bucket, count in zip(groups.buckets, rows.tolist(), strict=True):
            shares[bucket] += part.weight * count / max(1, datasets[key].num_rows)
    facts = Facts(
        latent_channels=int(dataset.codec["latent_channels"]),
        factor=int(dataset.codec["factor"]),
        num_classes=num_classes,
        moments=dataset.posterior == "moments",
        buckets=tuple(sorted(shares, key=lambda bucket: (-shares[bucket], bucket))),
        codec=codec,
        texts=its_texts,
        text_dim=text_dim,
        layouts=tuple(each.layout_digest for each in datasets.values()),
        init=start.init,
        scale=scale_of(start, dataset),
        license=license_of(start),
        zero_empty_text=info is not None and info.zero_empty_text,
        shift_by_size=None if start.shift_by_size is None else asdict(start.shift_by_size),
    )
    _check_model(config, facts, " and ".join(each.uri for each in datasets.values()))
    if start.weights is not None:
        facts = _with_weights(start, facts)
    drawn: dict[str, GridConfig | DistanceConfig] = {"grid": config.grid, "distance": config.distance}
    for name, section in drawn.items():
        if section.every_images is None:
            continue
        if facts.codec is None:
            raise ConfigError(
                f"Latents are decoded for pictures, and {dataset.uri} does not say where its codec lies",
                key="codec.path",
                rule=f"{name}.every_images decodes with the codec that made the latents",
                next_step=f"set codec.path, or {name}.every_images=null",
            )
        _check_drawing(config, facts, name, section.sampler.guidance)
    _check_prompts(config, facts)
    extractor = config.distance.extractor if config.distance.every_images is not None else None
    for name in ("path", "weights") if extractor else ():
        if (file := getattr(extractor, name)) is not None and not Path(file).is_file():
            raise ConfigError(
                "There is no such file",
                key=f"distance.extractor.{name}",
                value=file,
                rule="the feature network is a file that every node sees",
                next_step="correct the path, or set distance.every_images=null",
            )
    return facts


def _with_weights(start: Start, facts: Facts) -> Facts:
    """The facts, adapters included, where the weights to start from fit the network by every name and shape."""
    from pipeline.model.load import (
        check_start,
        targets_in,  # torch, which most runs' drivers do without
    )

    config, weights = start.config, start.weights
    assert weights is not None
    sizes = {name: getattr(facts, name) for name in ("latent_channels", "num_classes", "text_dim")}
    check_start(config.model, weights, **sizes)
    if config.lora is None:
        return facts
    chosen, rank = targets_in(config.model, config.lora.targets, **sizes), config.lora.rank
    return replace(facts, lora={"rank": rank, "alpha": config.lora.alpha or rank, "targets": list(chosen)})


def _texts_of(config: TrainJobConfig, datasets: Datasets, pins: Pins | None) -> tuple[dict[str, Any], ...]:
    """The `text_facts` of the first dataset's embeddings, when those of all were made alike and can be read."""
    check_text_uris(config)
    texts = {
        key: tuple(text_facts(uri, datasets[key], f"{key}.text", pins, part.captions) for uri in part.text)
        for key, part in config.data.parts.items()
        if part.text
    }
    if texts:
        check_same_encoders(texts)
    check_arrangement(config, texts.get("data", ()))
    return texts.get("data", ())


def trained_combinations(config: TrainJobConfig, facts: Facts) -> tuple[Combination, ...]:
    """The combinations of conditions that a share of the samples is trained on."""
    t = config.train
    label_dropout = None if facts.num_classes is None else t.label_dropout
    text_dropout = None if not facts.texts else t.text_dropout
    shares = combination_shares(label_dropout, text_dropout, t.joint_dropout)
    return tuple(one for one in COMBINATIONS if shares[one] > 0.0)


def _check_prompts(config: TrainJobConfig, facts: Facts) -> None:
    """ConfigError when grids would show prompts that the model does not read, or that are not embedded."""
    if config.grid.prompts and not facts.texts:
        raise ConfigError(
            "The model reads no text",
            key="grid.prompts",
            value=", ".join(config.grid.prompts),
            rule="prompts are shown by models that learn from data.text",
            next_step="leave grid.prompts out, or set data.text",
        )
    for uri in config.data.text if config.grid.prompts else ():
        if absent := TextEmbeddings.open(uri, cache_bytes=1, key="data.text").missing(config.grid.prompts):
            raise ConfigError(
                f"{len(absent)} of {len(config.grid.prompts)} prompts have no embedding at {uri}",
                key="grid.prompts",
                value=absent[0],
                rule="what grids show is embedded before training starts, by the encoders of the captions",
                next_step=f"run jobs.embed_text again with prompts='{json.dumps(config.grid.prompts)}'",
            )


def _check_drawing(config: TrainJobConfig, facts: Facts, section: str, guidance: float) -> None:
    """ConfigError when a section would draw what is never trained: a combination of conditions, or none of them."""
    learned, t = trained_combinations(config, facts), config.train
    full = combination(labelled=facts.num_classes is not None, prompted=bool(facts.texts))
    if full not in learned:
        dropouts = {"class": "label_dropout", "text": "text_dropout", "class+text": "joint_dropout"}
        name = next(name for what, name in dropouts.items() if what in full and getattr(t, name) == 1.0)
        raise ConfigError(
            f"Pictures are drawn of {full}, and the model is trained on {', '.join(learned)} only",
            key=f"train.{name}",
            value=getattr(t, name),
            rule="pictures are drawn of conditions that are trained",
            next_step=f"set train.{name} below 1, or {section}.every_images=null",
        )
    # With one condition such grids have always been drawn without guidance, and runs that have them go on.
    if full == "class+text" and "none" not in learned and guidance != 1.0:
        raise ConfigError(
            f"Guidance leads away from no condition, and the model is trained on {', '.join(learned)} only",
            key=f"{section}.sampler.guidance",
            value=guidance,
            rule="guidance other than 1 needs a model that is also trained without label and text",
            next_step=f"set {section}.sampler.guidance=1, or train.joint_dropout above 0",
        )


def _all_classes(config: TrainJobConfig, given: int | None, theirs: int | None) -> int | None:
    """Classes of the model: the data's, or as many as the network has that they are taught to."""
    if given is None or theirs is None:
        return given
    if given > theirs:
        raise ConflictError(
            f"The rows have {given:,} classes, the network was made for {theirs:,}",
            key="train.conditional",
            value=str(config.train.conditional),
            rule="a network that exists has an embedding for each class",
            next_step="start from other weights, or set train.conditional=false where the network allows it",
        )
    foreign = isinstance(config.model, PublishedConfig) and config.model.class_name != "DiTTransformer2DModel"
    if foreign and config.train.label_dropout:
        raise ConfigError(
            f"A {config.model.class_name} has no embedding that means no class",  # type: ignore[union-attr]
            key="train.label_dropout",
            value=config.train.label_dropout,
            rule="labels are dropped for the label that means none",
            next_step="set train.label_dropout=0",
        )
    return theirs


def _check_model(config: TrainJobConfig, facts: Facts, uri: str) -> None:
    if isinstance(config.model, InstalledConfig):
        installed_network(config.model.name)  # here, before a worker finds out
    model, given = config.model, {"labels": facts.num_classes is not None, "text": bool(facts.texts)}
    misfit = model.misfit(**given)
    if misfit is not None:
        if misfit == "text":
            name, key, value = "text embeddings", "data.text", _uris(facts.texts) or "[]"
            absent = f"and data.text names none for {uri}"
            give, leave = "run jobs.embed_text on the dataset and name what it wrote", "set data.text=[]"
        else:
            name, key, value = "classes", "train.conditional", str(config.train.conditional)
            absent = f"rows of {uri} have no label" if config.train.conditional else "train.conditional is false"
            give, leave = "learn from a dataset of which all rows have labels", "set train.conditional=false"
        raise ConfigError(
            f"The model {model.kind} "
            + (f"cannot read {name} such as those of {uri}" if given[misfit] else f"needs {name}, {absent}"),
            key=key,
            value=value,
            rule="for {} classes are {}, and text is {}".format(model.kind, *model.uses),
            next_step=f"{leave if given[misfit] else give}, or choose {kinds_for(**given)}",
        )
    wrong = [bucket for bucket, size in facts.latent_sizes.items() if not model.sides.take(*size)]
    if wrong:
        raise ConfigError(
            f"The model {model.kind} takes latents with {model.sides.rule()} "
            f"(images with {model.sides.rule(facts.factor)}), the dataset has buckets {', '.join(wrong)}",
            key=f"model.{model.sides.key}",
            value=getattr(model, model.sides.key),
            rule="a model takes every bucket of its datasets",
            next_step="change the sizes of the model, encode at sizes that it takes, or choose another model.kind",
        )


def identity(config: TrainJobConfig, dataset: LatentDataset, facts: Facts) -> dict[str, Any]:
    """What must not change between the start and the resume of a run, flat, for a field-by-field comparison.

    Learning rate, length, intervals and numbers of workers are free: they may be tuned while a run goes on.
    """
    model = {f"model.{k}": v for k, v in config.model.described().items()}
    model.pop("model.activation_checkpointing", None)
    # Both None in checkpoints of before they could be anything else, which lack them.
    model |= {"model.init": facts.init and facts.init["digest"], "data.normalise": facts.scale, "lora": facts.lora}
    sections = {"objective": config.objective, "timesteps": config.timesteps}
    learned = {f"{s}.{k}": v for s, part in sections.items() for k, v in part.model_dump(mode="json").items()}
    if not config.objective.zero_terminal_snr:
        del learned["objective.zero_terminal_snr"]  # as in checkpoints of before it could be asked for
    return {
        **model,
        **learned,
        "train.batch_size": config.train.batch_size,
        "train.label_dropout": config.train.label_dropout,
        "train.ema": [t.model_dump(mode="json") for t in config.train.ema],
        "num_classes": facts.num_classes,
        **({} if not facts.texts else {"train.text_dropout": config.train.text_dropout}),
        # Checkpoints from when both were dropped by one draw have no such key: they do not go on with three.
        **({"train.joint_dropout": config.train.joint_dropout} if facts.texts and facts.num_classes else {}),
        # Runs of releases that knew AdamW alone have no such key.
        **({} if config.train.optimizer == "adamw" else {"train.optimizer": config.train.optimizer}),
        "dataset.fingerprint": dataset.fingerprint_digest,
    }
