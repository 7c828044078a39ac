"""What a run starts from: the weights of `model.init`, and what of a configuration follows from them. No torch.

Weights bring their network, and where the configuration does not say otherwise their objective and the scale of
their latents. What must stay as they learned it is compared with the data before anything is started.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.codec.codec import codec_info
from pipeline.diffusion.config import TimestepConfig
from pipeline.errors import ConfigError, ConflictError, InputError, PipelineError, argument_keys
from pipeline.model.config import NetworkConfig, PublishedConfig
from pipeline.model.info import PublishedPipeline, SizeShift, codec_scale
from pipeline.model.read import InitialWeights, StoredModel, read_init
from pipeline.storage.root import Root
from pipeline.store.ledger.identity import differences
from pipeline.store.read.dataset import Dataset, LatentDataset
from pipeline.store.read.pins import Pins
from pipeline.text.config import TextEncoderConfig
from pipeline.text.dataset import ARRANGEMENTS, captions_seen
from pipeline.text.files import SPOKEN, encoder_files
from pipeline.tracking.config import REGISTERED, resolve_paths
from pipeline.tracking.queries import NotRegisteredError, resolve
from pipeline.train.config import CodecOverride, TrainJobConfig

_log = logging.getLogger(__name__)
# What may differ between the network that weights are of and the one that is trained from them.
_FREE = ("activation_checkpointing", "dropout", "distilled_guidance", "sample_size", "max_size")
_NEXT = "start from weights of this network, or set model as they have it"


@dataclass(frozen=True)
class Start:
    """A configuration with all that its weights say filled in, and these weights; None for random ones."""

    config: TrainJobConfig
    weights: InitialWeights | None = None
    shift_by_size: SizeShift | None = None  # of the sampling times, where the configuration says none

    @property
    def init(self) -> dict[str, Any] | None:
        """As `Facts.init`: where the weights lie, their digest, and the run that trained them."""
        if self.weights is None:
            return None
        info, init = self.weights.info, self.config.model.init
        assert init is not None
        hub = self.weights.hub
        return {
            "uri": init.uri if hub else self.weights.uri,
            "digest": self.weights.digest,
            "run_id": None if info is None else info.run_id,
            "revision": init.revision if hub else None,
            "subfolder": init.subfolder,
            "ema": init.ema,
        }


def start_of(config: TrainJobConfig, begun: Mapping[str, Any] | None = None) -> Start:
    """The start of a run; begun: `Start.init` of the run that goes on, empty where that began with random weights.

    What an alias means now is not asked of a run that goes on. InputError or ConfigError where there are no such
    weights, ConflictError where they are another network's.
    """
    network, init = config.model, config.model.init
    if init is None:
        return Start(config)
    place, named = init.uri, init.uri.startswith(REGISTERED)
    if named and begun is not None:
        if not begun:
            return Start(config)
        place = str(begun["uri"])
    try:
        if named and begun is None:
            place = resolve(place, resolve_paths(config.tracking).uri).uri
    except InputError as error:
        if init.absent == "random" and isinstance(error, NotRegisteredError):
            _log.warning("random weights: %s", error.what)
            return Start(config)
        raise error.but(key="model.init.uri") from None
    try:
        weights = read_init(init.model_copy(update={"uri": place}))
    except PipelineError as error:
        keys = {"model.uri": "model.init.uri", "model.ema": "model.init.ema"}
        raise error.but(key=keys.get(error.key or "", error.key)) from error
    theirs, values = weights.network, network.model_dump(by_alias=True)
    if isinstance(network, PublishedConfig) and network.class_name is None and isinstance(theirs, PublishedConfig):
        values |= {"class": theirs.class_name, "config": theirs.config}
    resolved = type(network).model_validate(values)
    _check_network(resolved, theirs, weights.uri)
    changes: dict[str, Any] = {"model": resolved}
    if weights.info is not None:
        objective = weights.info.objective
        if "objective" not in config.model_fields_set:
            changes["objective"] = objective
        elif config.objective.kind != objective.kind and init.objective == "same":
            raise ConflictError(
                f"The weights at {weights.uri} learned to predict {objective.kind}",
                key="objective.kind",
                value=config.objective.kind,
                rule="a run goes on with the prediction that its weights learned",
                next_step=f"leave objective out, or set objective.kind={objective.kind}; to teach them another one, "
                "set model.init.objective=any",
            )
        if "timesteps" not in config.model_fields_set:
            flow = changes.get("objective", config.objective).kind == "flow"
            changes["timesteps"] = (
                TimestepConfig(shift=weights.info.sampling_shift) if flow else TimestepConfig(density="uniform")
            )
    elif "objective" not in config.model_fields_set:
        raise ConfigError(
            f"The network at {weights.uri} does not say what it learned to predict",
            key="objective.kind",
            value=config.objective.kind,
            rule="a network alone has no scheduler; a pipeline, an export or a checkpoint says it",
            next_step="set objective (and timesteps) as it was trained, or start from its pipeline",
        )
    by_size = weights.info.shift_by_size if weights.info and "timesteps" in changes else None
    return Start(config.model_copy(update=changes), weights, by_size)


def weights_of(config: TrainJobConfig, found: Mapping[str, Any]) -> InitialWeights:
    """The weights that the driver found (see `Start.init`), on this node; ConflictError where they are others."""
    init = config.model.init
    assert init is not None
    uri = str(found["uri"]) if init.uri.startswith(REGISTERED) else init.uri
    weights = read_init(init.model_copy(update={"uri": uri}))
    if weights.digest != found["digest"]:
        raise ConflictError(
            "The weights to start from are other ones on this node than those that the job began with",
            key="model.init.uri",
            value=weights.uri,
            rule="every node sees the same files, and nobody changes them meanwhile",
            next_step="put them where all nodes read, or copy them to each under one path",
        )
    return weights


def scale_of(start: Start, dataset: LatentDataset) -> dict[str, list[float]] | None:
    """What latents are normalised by, {"mean", "std"} per channel; None: the statistics of the data."""
    how, weights = start.config.data.normalise, start.weights
    if how is None and weights is not None and weights.info is not None:
        return {"mean": list(weights.info.latent_mean), "std": list(weights.info.latent_std)}
    if how == "codec" or (how is None and isinstance(start.config.model, PublishedConfig)):
        mean, std = codec_scale(dataset.codec, int(dataset.codec["latent_channels"]))
        return {"mean": list(mean), "std": list(std)}
    return None


def locate_codec(override: CodecOverride, made_by: dict[str, Any]) -> dict[str, Any] | None:
    """Where the codec of the latents lies now; ConflictError when `codec.path` names another one.

    A local path is made absolute: it is used by processes in other directories.
    """
    if override.path is None:
        path, place = made_by.get("path"), {"revision": made_by.get("revision"), "kind": made_by.get("kind", "auto")}
    else:
        path, place = override.path, {"revision": override.revision, "kind": override.kind}
        theirs = made_by.get("weights_sha256")
        with argument_keys("codec"):
            ours = codec_info(override.path, override.revision, override.kind).weights_sha256
        if theirs != ours:
            raise ConflictError(
                f"The codec at {override.path} (weights {ours}) did not make these latents (weights {theirs})",
                key="codec.path",
                value=override.path,
                rule="latents are decoded by the codec that encoded them",
                next_step="name the codec that the dataset was encoded with, or leave codec.path out",
            )
    if path is None:
        return None
    return {"path": str(Path(path).absolute()) if Path(path).exists() else str(path), **place}


def license_of(start: Start) -> str | None:
    """The licence that the weights to start from state; ConfigError where none does and export.license says none."""
    weights, stated = start.weights, None
    if weights is None:
        return None
    if weights.info is not None and weights.info.license != "unknown":
        stated = weights.info.license
    card = Root(weights.uri)
    if stated is None and card.exists("README.md"):
        front = re.match(r"---\n(.*?)\n---", card.read_bytes("README.md").decode(errors="replace"), re.DOTALL)
        found = re.search(r"^license:\s*[\"']?([\w.+-]+)", front.group(1), re.MULTILINE) if front else None
        stated = found.group(1) if found and found.group(1) != "unknown" else None
    if stated is None and start.config.export.license is None:
        raise ConfigError(
            f"The weights at {weights.uri} state no licence",
            key="export.license",
            value="null",
            rule="what is trained from weights carries their licence on",
            next_step="set export.license to theirs (as their model card or their makers say it)",
        )
    return stated


def check_start_fits(start: Start, dataset: LatentDataset, texts: tuple[dict[str, Any], ...]) -> None:
    """ConflictError, naming both sides, when weights meet latents of another codec or text of another encoder.

    texts: `text_facts` of the first dataset's embeddings, in their order.
    """
    weights = start.weights
    if weights is None:
        return
    network, made_by = weights.network, dataset.codec
    info, init = weights.info, start.config.model.init
    assert init is not None
    channels = network.latent_channels if isinstance(network, PublishedConfig) else None
    if info is not None:
        channels = info.latent_channels
    if channels not in (None, int(made_by["latent_channels"])):
        raise _other("latents", f"{channels} channels", f"{made_by['latent_channels']} channels", "data.uri", dataset)
    if info is not None and info.factor != int(made_by["factor"]):
        raise _other("latents", f"1/{info.factor} of the size", f"1/{made_by['factor']}", "data.uri", dataset)
    if info is not None and init.codec == "same":
        learned = info.codec.weights_sha256
        if learned is None and info.codec.path:
            with argument_keys("model.init"):
                learned = codec_info(info.codec.path, info.codec.revision, info.codec.kind).weights_sha256
        if learned not in (None, made_by.get("weights_sha256")):
            error = _other("latents", f"the codec {learned}", f"{made_by.get('weights_sha256')}", "data.uri", dataset)
            raise error.but(
                next_step="encode the images with the codec of these weights; where this one gives the same latents, "
                "such as a copy in another precision, set model.init.codec=any"
            )
    for at, (theirs, ours) in enumerate(zip(_fingerprints(weights), texts, strict=False)):
        differing = list(differences(theirs, _comparable(ours["fingerprint"])))
        if differing:
            shown = "\n".join(f"    {name}: {one} there, {other} here" for name, one, other in differing[:8])
            raise ConflictError(
                f"The embeddings at {ours['uri']} are of another text encoder than the weights learned:\n{shown}",
                key=f"data.text.{at}",
                value=ours["uri"],
                rule="text is embedded by the encoders that a model learned with, read as it reads them",
                next_step="run jobs.embed_text with these encoders (of a pipeline: its text_encoder folders, with "
                "layer, prompt, pooled, padding and max_length as above)",
            )


def text_facts(
    uri: str,
    latents: LatentDataset,
    key: str = "data.text",
    pins: Pins | None = None,
    captions: Sequence[str] = ("caption",),
) -> dict[str, Any]:
    """What a model must know of the embeddings at `uri`; ConflictError when they are not of these latents' captions.

    captions: their names, see `stream.data.Captions`.
    {"uri", "digest", "width", "max_length", "encoder": a TextEncoderConfig as JSON, "fingerprint"}.
    """
    text: Dataset = Dataset.open_kind(uri, "text", key, pins)
    seen = [version.source for version in text.state.plan.versions]
    unfinished, known = text.state.gaps().count(), captions_seen(text.state.plan, latents.digest)
    if known and (unread := [name for name in captions if name not in known]):
        raise ConflictError(
            f"The embeddings at {uri} are of {', '.join(sorted(known))} alone",
            key=key.replace("text", "captions"),
            value=", ".join(unread),
            rule="every caption that may be drawn has its embedding before training starts",
            next_step=f"run jobs.embed_text with captions='{json.dumps(list(captions))}': it embeds what is new",
        )
    if unfinished or not known:
        made_from = f"{seen[-1].get('uri')} (digest {seen[-1].get('digest')})" if seen else "nothing"
        raise ConflictError(
            f"The embeddings at {uri} were made from {made_from}"
            + (f" and lack {unfinished:,} captions" if unfinished else "")
            + f"; the latents are {latents.uri} (digest {latents.digest})",
            key=key,
            value=uri,
            rule="every caption of the latents has its embedding before training starts",
            next_step="run jobs.embed_text on the latents: it embeds only what is new",
        )
    made_by, where = text.fingerprint, dict(text.identity.about["encoder"])
    shared = {name: made_by[name] for name in ("max_length", "layer", "pooled", "embedding_dtype")}
    shared |= {name: made_by[name] for name in SPOKEN if name in made_by}
    path = where["path"]
    encoder = {
        **where,
        "path": str(Path(path).absolute()) if Path(path).exists() else path,
        **shared,
        "dtype": made_by["encoder_dtype"],
    }
    facts = {"uri": text.uri, "digest": text.digest, "width": made_by["width"], "max_length": made_by["max_length"]}
    return {**facts, "encoder": encoder, "fingerprint": made_by}


def check_arrangement(config: TrainJobConfig, texts: tuple[dict[str, Any], ...]) -> None:
    """ConfigError when a network reads text of other encoders, by number, width or padding, than there are."""
    network = config.model
    arrangement = network.arrangement if isinstance(network, PublishedConfig) else "single"
    if not texts or arrangement == "none":
        return
    fewest, most = ARRANGEMENTS[arrangement]
    made = [text["fingerprint"] for text in texts]
    pooling = {"sdxl": made[1:], "sd3": made[:2], "flux": made[:1]}.get(arrangement, [])
    wrong = None
    if not fewest <= len(made) <= most:
        wanted = str(fewest) if fewest == most else f"{fewest} to {most}"
        wrong = f"it reads {wanted} text encoders, data.text names {len(made)}"
    elif any(one["pooled"] == "none" for one in pooling):
        wrong = "it reads pooled states, and these encoders stored none: embed with pooled: projection (or pooler)"
    elif len({one["embedding_dtype"] for one in made}) > 1:
        wrong = "several encoders are stored in one embedding_dtype"
    elif isinstance(network, PublishedConfig):
        states = made[1:] if arrangement == "flux" else made
        if any(one.get("padding", "masked") != network.padding for one in states):
            wrong = f"its padding is {network.padding}: embed with padding: {network.padding}"
        width = sum(one["width"] for one in states[:2]) if arrangement in ("sdxl", "sd3") else states[0]["width"]
        if width > (network.text_dim or 0) or (arrangement != "sd3" and width != network.text_dim):
            wrong = f"it reads states of width {network.text_dim}, these are {width} wide"
    if wrong:
        raise ConfigError(
            f"The network does not read this text: {wrong}",
            key="data.text",
            value=", ".join(text["uri"] for text in texts),
            rule=f"{network.kind} reads its text as {arrangement!r}",
            next_step="name the embeddings of its encoders in their order, made by jobs.embed_text",
        )


def _check_network(ours: NetworkConfig, theirs: NetworkConfig, uri: str) -> None:
    if ours.kind != theirs.kind:  # type: ignore[attr-defined]
        raise ConflictError(
            f"The weights at {uri} are of the kind {theirs.kind}",  # type: ignore[attr-defined]
            key="model.kind",
            value=ours.kind,  # type: ignore[attr-defined]
            rule="a run trains the network that its weights are of",
            next_step=_NEXT,
        )
    one, other = ({k: v for k, v in n.described().items() if k not in _FREE} for n in (theirs, ours))
    differing = list(differences(one, other))
    if differing:
        raise ConflictError(
            f"The weights at {uri} are of another network:\n"
            + "\n".join(f"    {name}: {a} there, {b} in model" for name, a, b in differing[:8]),
            key=f"model.{differing[0][0]}",
            value=differing[0][2],
            rule="a run trains the network that its weights are of",
            next_step=_NEXT,
        )


def _fingerprints(weights: InitialWeights) -> list[dict[str, Any]]:
    """Of the text encoders that the weights learned with, as far as anybody knows."""
    place = weights.place.place if isinstance(weights.place, StoredModel) else weights.place
    if isinstance(place, PublishedPipeline):
        local = place.root.local_path()
        if local is None:
            return []
        encoders = [TextEncoderConfig(path=str(local), **asdict(encoder)) for encoder in place.encoders]
        return [_comparable(encoder_files(encoder).fingerprint(encoder)) for encoder in encoders]
    texts = () if weights.info is None else weights.info.texts
    return [_comparable(text.fingerprint) for text in texts if isinstance(text.fingerprint, dict)]


def _comparable(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """What decides what a state means: not in which precision it was computed and stored, nor how long it may be."""
    aside = ("encoder_dtype", "embedding_dtype", "max_length")
    return {"padding": "masked", **{k: v for k, v in fingerprint.items() if k not in aside}}


def _other(what: str, learned: str, given: str, key: str, dataset: LatentDataset) -> ConflictError:
    return ConflictError(
        f"The weights learned {what} of {learned}, {dataset.uri} holds those of {given}",
        key=key,
        value=dataset.uri,
        rule="a run goes on with the latents that its weights learned",
        next_step="encode the images with the codec of these weights, or start from others",
    )
