"""The files of a text encoder: found, checked and hashed without torch or transformers.

What is hashed here is what `encoder` loads: a fingerprint made before a GPU is touched is the one of the rows.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from pipeline.config import need_package
from pipeline.errors import ConfigError, ConflictError, InputError
from pipeline.storage.trust import HUB_ID, hub_snapshot
from pipeline.text.config import TextEncoderConfig

WEIGHTS = "model.safetensors"
INDEX = WEIGHTS + ".index.json"
VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model")
TOKENIZER_FILES = (
    *VOCABULARIES,
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_TEMPLATE = "chat_template.jinja"  # of newer tokenizers; tokenizer_config.json holds that of older ones
PROCESSOR = "processor_config.json"  # what pictures and texts are read by together; its tokenizer reads texts alone
_PROCESSOR_FILES = (PROCESSOR, "preprocessor_config.json")
_CLIP = ("clip", "clip_text_model")
# Which pool nothing and hold texts of any length.
_OTHERS = {
    "t5": "T5EncoderModel",
    "gemma2": "Gemma2Model",
    "qwen3": "Qwen3ForCausalLM",
    "mistral3": "Mistral3ForConditionalGeneration",
}
_PICKLE = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")
_LAYOUT = f"an encoder is a directory with config.json, {WEIGHTS} and its tokenizer's files"
# Notes of whoever saved the file; they change no number.
_NOTES = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures")
# What a config.json may not decide: which files are read, which kernels compute.
_OURS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal", "transformers_weights")
_CHUNK_BYTES = 8 << 20


SPOKEN = ("padding", "prompt", "system", "letters", "instruction")  # what a fingerprint tells where it is not usual


@dataclass(frozen=True)
class EncoderFiles:
    """One encoder as it lies on local disk, with everything that decides its numbers.

    `weights`: names of the weight files, and of their index where there is one.
    """

    model_dir: Path
    tokenizer_dir: Path
    class_name: str
    width: int
    max_length: int
    config: dict[str, Any]
    weights: tuple[str, ...]
    weights_sha256: str
    tokenizer_sha256: dict[str, str]

    def paths(self) -> dict[str, Path]:
        """What a library may see of it, by name: weights below model/, the tokenizer's files below tokenizer/."""
        model = {f"model/{name}": self.model_dir / name for name in self.weights}
        return model | {f"tokenizer/{name}": self.tokenizer_dir / name for name in self.tokenizer_sha256}

    def model_config(self) -> str:
        """The config.json that a library may see: the fingerprint's, without what is not the file's to say."""
        return json.dumps(_without(self.config, _OURS))

    def check(self) -> None:
        """ConflictError unless the files are still, and on this node, those that were hashed."""
        names = [name for name in self.weights if name != INDEX]
        weights = _joined([_sha256(self.model_dir / name) for name in names])
        tokenizer = {name: _sha256(self.tokenizer_dir / name) for name in self.tokenizer_sha256}
        if (weights, tokenizer) != (self.weights_sha256, self.tokenizer_sha256):
            raise ConflictError(
                "The text encoder's files are other ones here than those that the job began with",
                key="encoders.path",
                value=self.model_dir,
                rule="every node holds the same files under one path, and nobody changes them meanwhile",
                next_step="copy the encoder to every node again, then start again",
            )

    def fingerprint(self, encoder: TextEncoderConfig) -> dict[str, Any]:
        """What all embeddings of a dataset share."""
        return {
            "encoder": {
                "class": self.class_name,
                "config": self.config,
                "weights_sha256": self.weights_sha256,
                "tokenizer_sha256": self.tokenizer_sha256,
            },
            "caption_hash": "blake2b-128 of the UTF-8 caption",
            "max_length": self.max_length,
            "width": self.width,
            "layer": encoder.layer if isinstance(encoder.layer, str) else list(encoder.layer),
            "pooled": encoder.pooled,
            # Masked and plain in every fingerprint of before there was another way.
            **({} if encoder.padding == "masked" else {"padding": encoder.padding}),
            **({} if encoder.prompt == "plain" else {"prompt": encoder.prompt}),
            **({} if encoder.system is None else {"system": encoder.system}),
            **({} if encoder.letters == "kept" else {"letters": encoder.letters}),
            **({} if encoder.instruction is None else {"instruction": encoder.instruction}),
            "encoder_dtype": encoder.dtype,
            "embedding_dtype": encoder.embedding_dtype,
        }


def encoder_files(encoder: TextEncoderConfig) -> EncoderFiles:
    """Find, check and hash an encoder; InputError or ConfigError says what is wrong with which key."""
    need_package("transformers", "text")
    base = _directory(encoder).absolute()  # who loads it may run in another directory
    model_dir, tokenizer_dir = base / encoder.subfolder, base / encoder.tokenizer_subfolder
    config = _read_config(model_dir, encoder)
    kind = config.get("model_type")
    if kind not in (*_CLIP, *_OTHERS):
        raise _refusal(
            f"The encoder {encoder.name} is of model_type {kind!r}",
            encoder,
            "encoders are CLIP text models (OpenAI's and OpenCLIP's, in transformers format), T5, Gemma 2, Qwen 3 "
            "and Mistral 3",
            "name another model, or the subfolder that holds the text encoder of a pipeline",
        )
    if kind == "clip":
        config = {"model_type": "clip", "text_config": config.get("text_config") or {}}
    text = {**config, **config.get("text_config", {})}
    width = text.get("d_model" if kind == "t5" else "hidden_size")
    if not isinstance(width, int):
        raise _refusal(f"config.json of {encoder.name} does not say how wide an embedding is", encoder)
    if kind in _OTHERS and encoder.pooled != "none":
        raise ConfigError(
            f"The encoder {encoder.name} is a {_OTHERS[kind]}, which pools nothing",
            key="encoders.pooled",
            value=encoder.pooled,
            rule="only CLIP has a pooled state",
            next_step="set pooled: none",
        )
    if not isinstance(encoder.layer, str):
        layers = text.get("num_layers" if kind == "t5" else "num_hidden_layers")
        if not isinstance(layers, int) or max(encoder.layer) > layers:
            raise ConfigError(
                f"The encoder {encoder.name} has no hidden state {max(encoder.layer)}",
                key="encoders.layer",
                value=list(encoder.layer),
                rule=f"its states are 0, the embedded tokens, to {layers}",
                next_step="name layers that it has",
            )
        width *= len(encoder.layer)
    clip_class = "CLIPTextModelWithProjection" if encoder.pooled == "projection" else "CLIPTextModel"
    weights = _weight_names(model_dir, encoder)
    return EncoderFiles(
        model_dir,
        tokenizer_dir,
        _OTHERS.get(str(kind), clip_class),
        width,
        _max_length(encoder, None if kind in _OTHERS else text.get("max_position_embeddings")),
        config,
        weights,
        _joined([_sha256(model_dir / name) for name in weights if name != INDEX]),
        _hash_tokenizer(tokenizer_dir, encoder),
    )


def _refusal(what: str, encoder: TextEncoderConfig, rule: str = _LAYOUT, next_step: str | None = None) -> InputError:
    return InputError(what, key="encoders.path", value=encoder.path, rule=rule, next_step=next_step)


def _directory(encoder: TextEncoderConfig) -> Path:
    local = Path(encoder.path).expanduser()
    if local.is_dir():
        return local.absolute()
    if encoder.revision is None or local.exists() or not HUB_ID.fullmatch(encoder.path):
        raise _refusal(
            f"There is no directory of the encoder {encoder.name}",
            encoder,
            next_step="correct the path; to take it from the hub, pin it with revision: <commit or tag>",
        )
    model, tokenizer = (f"{f}/" if f else "" for f in (encoder.subfolder, encoder.tokenizer_subfolder))
    patterns = [model + name for name in ("config.json", "model*.safetensors", INDEX)]
    patterns += [tokenizer + name for name in (*TOKENIZER_FILES, _TEMPLATE, *_PROCESSOR_FILES)]
    what = f"the encoder {encoder.name} at revision {encoder.revision}"
    return hub_snapshot(encoder.path, encoder.revision, patterns, what=what, key="encoders.path")


def _read_config(folder: Path, encoder: TextEncoderConfig) -> dict[str, Any]:
    try:
        config = from_json((folder / "config.json").read_bytes())
    except FileNotFoundError:
        raise _refusal(f"The encoder {encoder.name} has no config.json", encoder) from None
    except ValueError as error:
        raise _refusal(f"config.json of {encoder.name} is no valid JSON: {error}", encoder) from None
    if not isinstance(config, dict):
        raise _refusal(f"config.json of {encoder.name} holds no JSON object", encoder)
    named = config.get("transformers_weights")
    if named not in (None, WEIGHTS, INDEX):
        raise _refusal(
            f"config.json of {encoder.name} names weights of its own: {named}",
            encoder,
            f"weights are read from {WEIGHTS}, or from the files that {INDEX} lists",
            "rename the file to be used, and remove transformers_weights from config.json",
        )
    return _without(config, _NOTES)


def _without(config: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {k: _without(v, keys) if isinstance(v, dict) else v for k, v in config.items() if k not in keys}


def _max_length(encoder: TextEncoderConfig, most: int | None) -> int:
    length = encoder.max_length or most
    if length is None or (most is not None and length > most):
        raise ConfigError(
            f"The encoder {encoder.name} needs a max_length"
            + (f" of at most {most} tokens" if most is not None else ": its files do not bound it"),
            key="encoders.max_length",
            value=encoder.max_length,
            rule="all batches of an encoder have one length, and longer captions are cut to it",
            next_step=f"set max_length: {most or 256}",
        )
    return length


def _weight_names(folder: Path, encoder: TextEncoderConfig) -> tuple[str, ...]:
    """The weight file, or the shards in order and their index."""
    single, sharded = (folder / WEIGHTS).is_file(), (folder / INDEX).is_file()
    if single and sharded:
        raise _refusal(
            f"The encoder {encoder.name} has its weights twice: {WEIGHTS} and {INDEX}",
            encoder,
            "one of them is loaded, and a reader cannot know which its maker means",
            "remove the one that is not to be used",
        )
    if single:
        return (WEIGHTS,)
    if not sharded:
        files = sorted(p.name for p in folder.iterdir())
        pickled = any(name.endswith(_PICKLE) for name in files)
        raise _refusal(
            f"The encoder {encoder.name} has no {WEIGHTS}; there is {', '.join(files)}",
            encoder,
            "weights are read from safetensors only" + (": unpickling runs code from the file" if pickled else ""),
            "where you trust the files, load and save_pretrained() them once; or copy the missing file",
        )
    try:
        names = sorted(set(from_json((folder / INDEX).read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise _refusal(f"The index {INDEX} of {encoder.name} cannot be read: {error!r}", encoder) from None
    # A name with a slash would lead out of the directory.
    bad = [n for n in names if "/" in n or "\\" in n or not n.endswith(".safetensors") or not (folder / n).is_file()]
    if bad or not names:
        raise _refusal(f"The index {INDEX} names files that are not there: {', '.join(bad) or 'none'}", encoder)
    return (*names, INDEX)


def _joined(hashes: list[str]) -> str:
    """One hash over the weight files; a single file's own sha256 when there is one."""
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def _hash_tokenizer(folder: Path, encoder: TextEncoderConfig) -> dict[str, str]:
    if not any((folder / name).is_file() for name in VOCABULARIES):
        raise InputError(
            f"The encoder {encoder.name} has no tokenizer",
            key="encoders.tokenizer_subfolder",
            value=encoder.tokenizer_subfolder,
            rule=f"a tokenizer's directory holds one of {', '.join(VOCABULARIES)}",
            next_step="save the tokenizer beside the model, or name the subfolder that holds it",
        )
    names = (*TOKENIZER_FILES, _TEMPLATE, *_PROCESSOR_FILES) if encoder.prompt == "chat" else TOKENIZER_FILES
    return {name: _sha256(folder / name) for name in sorted(names) if (folder / name).is_file()}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


@dataclass(frozen=True)
class TextSpec:
    """Encoders in order and how they become one text, see `text.dataset.arrange`.

    `masked`: padding is hidden from the model. `stored`: it learned from states as they are stored, rounded. `width`
    is that of one token's vector. `digest` covers every file that decides a number; `files` are each encoder's.
    `zero_empty`: without a prompt the model reads zeros.
    """

    encoders: tuple[TextEncoderConfig, ...]
    arrangement: str
    masked: bool
    stored: bool
    width: int
    digest: str
    files: tuple[EncoderFiles, ...]
    zero_empty: bool = False
