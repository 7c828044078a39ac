"""Which network is trained: one model per `kind`, each with the fields that kind has and no others.

Channels, classes and text width are not here: they come from the dataset and are checked against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import ConfigDict, Field, JsonValue, model_validator

from pipeline.config import StrictModel, installed_plugin

Use = Literal["required", "optional", "refused"]
# The diffusers classes that published pipelines may name: a closed list, for each has an adapter.
PublishedClass = Literal[
    "UNet2DModel",
    "UNet2DConditionModel",
    "DiTTransformer2DModel",
    "SD3Transformer2DModel",
    "FluxTransformer2DModel",
    "Flux2Transformer2DModel",
    "PixArtTransformer2DModel",
    "SanaTransformer2DModel",
]
# How the states of a model's text encoders become what it reads, see `text.dataset.arrange`.
Arrangement = Literal["none", "single", "sdxl", "sd3", "flux"]
Padding = Literal["masked", "attended", "shown"]


@dataclass(frozen=True)
class Sides:
    """Heights and widths that a network takes, in latent pixels; key: the field of its configuration that says so."""

    key: str
    multiple: int
    most: int | None = None
    only: int | None = None

    def take(self, height: int, width: int) -> bool:
        """Whether a latent of this size is one of them."""
        for side in (height, width):
            if side % self.multiple or side > (self.most or side) or side != (self.only or side):
                return False
        return True

    def rule(self, factor: int = 1) -> str:
        """The rule in words, for sides in units of 1/factor latent pixels."""
        if self.only is not None:
            return f"sides of {self.only * factor}"
        return f"sides in multiples of {self.multiple * factor}" + (
            "" if self.most is None else f" up to {self.most * factor}"
        )


class InitConfig(StrictModel):
    """The weights that a run starts from, safetensors only."""

    uri: str = Field(
        ...,
        min_length=1,
        description="An export, a checkpoint, models:/NAME@ALIAS, a diffusers pipeline or model directory, or a hub "
        "id with its revision.",
    )
    revision: str | None = Field(None, description="Commit or tag that pins a hub id.")
    subfolder: str | None = Field(
        None, pattern=r"^\w[\w-]*$", description="The denoiser's folder of a hub id that is no pipeline."
    )
    ema: str | None = Field(
        None, description="Which average of a checkpoint's; raw: the weights as trained. null: its first."
    )
    absent: Literal["refused", "random"] = Field(
        "refused",
        description="random: begin with random weights as long as the registry has no such model, as on the first "
        "night of a chain that goes on from models:/NAME@latest.",
    )
    codec: Literal["same", "any"] = Field(
        "same",
        description="same: the latents are of the codec that these weights learned with; any: of one that gives the "
        "same latents, such as a copy in another precision.",
    )
    objective: Literal["same", "any"] = Field(
        "same", description="Whether another objective.kind than these weights learned may be taught to them."
    )


class NetworkConfig(StrictModel):
    """What each kind declares of itself: whether it learns from classes and from text, and its sizes."""

    labels: ClassVar[Use] = "optional"
    text: ClassVar[Use] = "optional"

    init: InitConfig | None = Field(None, description="Weights to start from; null: random ones, by train.seed.")

    @property
    def uses(self) -> tuple[Use, Use]:
        """Whether it learns from classes, and from text."""
        return self.labels, self.text

    @property
    def sides(self) -> Sides:
        """Of the latents that it takes."""
        raise NotImplementedError

    @property
    def micro_conditions(self) -> bool:
        """Whether it reads sizes: of the original, of the crop, and the target's."""
        return False

    @property
    def distilled(self) -> bool:
        """Whether guidance is one of its inputs."""
        return False

    @property
    def pooled_dim(self) -> int | None:
        """Width of the pooled text vector that it reads; None for none."""
        return None

    def misfit(self, *, labels: bool, text: bool) -> Literal["labels", "text"] | None:
        """The condition that it requires and is not given, or is given and refuses; None where all fit."""
        return _misfit(*self.uses, labels=labels, text=text)

    def described(self) -> dict[str, Any]:
        """The network as JSON, without where its weights came from."""
        return self.model_dump(mode="json", by_alias=True, exclude={"init"})


def _misfit(of_labels: Use, of_text: Use, *, labels: bool, text: bool) -> Literal["labels", "text"] | None:
    if of_text == ("refused" if text else "required"):
        return "text"
    return "labels" if of_labels == ("refused" if labels else "required") else None


class DiTConfig(NetworkConfig):
    """The reference diffusion transformer: class and text conditioning, any height and width."""

    kind: Literal["dit"] = Field("dit", description="The reference diffusion transformer.")
    hidden: int = Field(384, ge=8, description="Width of a token; a multiple of heads.")
    depth: int = Field(12, ge=1, description="Number of transformer blocks.")
    heads: int = Field(6, ge=1, description="Attention heads per block; hidden / heads must be a multiple of 4.")
    patch: int = Field(2, ge=1, description="Side of the square of latent pixels that makes one token.")
    mlp_ratio: float = Field(4.0, gt=0, description="Width of the feed-forward layer, as a multiple of hidden.")
    position: Literal["rope", "sincos"] = Field(
        "rope", description="2-D positions: rope (rotary, relative) or sincos (added to the tokens)."
    )
    qk_norm: bool = Field(True, description="RMS-normalise queries and keys per head (steadier at scale, in bf16).")
    activation_checkpointing: bool = Field(
        False, description="Recompute each block in the backward pass: less memory, about a third more compute."
    )

    @model_validator(mode="after")
    def _heads_divide(self) -> DiTConfig:
        if self.hidden % (4 * self.heads):
            raise ValueError(f"hidden {self.hidden} must be a multiple of 4 * heads = {4 * self.heads}")
        return self

    @property
    def sides(self) -> Sides:
        return Sides("patch", self.patch)


class UNet2DConfig(NetworkConfig):
    """diffusers' UNet2DModel: convolutional, class conditioning."""

    text: ClassVar[Use] = "refused"

    kind: Literal["unet2d"] = Field("unet2d", description="diffusers UNet2DModel.")
    block_out_channels: tuple[int, ...] = Field(
        (64, 128), min_length=1, description="Channels of each level; each level after the first halves the latent."
    )
    layers_per_block: int = Field(1, ge=1, description="Residual layers per level.")
    attention: tuple[bool, ...] = Field(
        (False, True), description="Whether each level has self-attention; one entry per level."
    )
    attention_head_dim: int = Field(32, ge=1, description="Channels per attention head.")
    norm_num_groups: int = Field(32, ge=1, description="Groups of the group norms; divides every level's channels.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout inside the residual layers.")

    @model_validator(mode="after")
    def _levels_agree(self) -> UNet2DConfig:
        _check_levels(self.block_out_channels, self.attention, self.norm_num_groups)
        last = len(self.block_out_channels) - 1  # its middle block always attends
        attending = [c for at, c in enumerate(self.block_out_channels) if self.attention[at] or at == last]
        if min(attending) < self.attention_head_dim:
            raise ValueError(
                f"attention_head_dim {self.attention_head_dim} must not exceed the channels of a level that attends "
                f"(the last one always does): {min(attending)}"
            )
        return self

    @property
    def sides(self) -> Sides:
        return _of_levels(self.block_out_channels)


class UNet2DConditionConfig(NetworkConfig):
    """diffusers' UNet2DConditionModel: convolutional, cross-attention to text, optionally classes too."""

    text: ClassVar[Use] = "required"

    kind: Literal["unet2d_condition"] = Field("unet2d_condition", description="diffusers UNet2DConditionModel.")
    block_out_channels: tuple[int, ...] = Field(
        (320, 640, 1280, 1280),
        min_length=1,
        description="Channels of each level; each after the first halves the latent.",
    )
    layers_per_block: int = Field(2, ge=1, description="Residual layers per level.")
    attention: tuple[bool, ...] = Field(
        (True, True, True, False), description="Whether each level attends to the text; one entry per level."
    )
    attention_heads: int = Field(
        8, ge=1, description="Attention heads of each level; divides every level's channels."
    )
    norm_num_groups: int = Field(32, ge=1, description="Groups of the group norms; divides every level's channels.")
    activation_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass: less memory, more compute."
    )

    @model_validator(mode="after")
    def _levels_agree(self) -> UNet2DConditionConfig:
        _check_levels(self.block_out_channels, self.attention, self.norm_num_groups)
        _check_levels(self.block_out_channels, self.attention, self.attention_heads, name="attention_heads")
        return self

    @property
    def sides(self) -> Sides:
        return _of_levels(self.block_out_channels)


class DiTTransformer2DConfig(NetworkConfig):
    """diffusers' DiTTransformer2DModel: square latents of one size, class conditioning only.

    Its per-block label dropout is switched off (labels are dropped once, outside) and adaLN-zero is initialised to
    zero; every block still holds its own label table. Prefer `dit` unless the published class is needed.
    """

    labels: ClassVar[Use] = "required"
    text: ClassVar[Use] = "refused"

    kind: Literal["dit_transformer2d"] = Field("dit_transformer2d", description="diffusers DiTTransformer2DModel.")
    sample_size: int = Field(..., ge=1, description="Side of the square latent; other sizes are refused.")
    heads: int = Field(6, ge=1, description="Attention heads per block.")
    head_dim: int = Field(64, ge=4, multiple_of=4, description="Channels per head.")
    depth: int = Field(12, ge=1, description="Number of transformer blocks.")
    patch: int = Field(2, ge=1, description="Side of the square of latent pixels that makes one token.")
    activation_checkpointing: bool = Field(
        False, description="Recompute each block in the backward pass: less memory, more compute."
    )

    @model_validator(mode="after")
    def _in_patches(self) -> DiTTransformer2DConfig:
        if self.sample_size % self.patch:
            raise ValueError(f"sample_size {self.sample_size} must be a multiple of patch {self.patch}")
        return self

    @property
    def sides(self) -> Sides:
        return Sides("sample_size", self.patch, only=self.sample_size)


class SD3Transformer2DConfig(NetworkConfig):
    """diffusers' SD3Transformer2DModel: joint attention over text and latent, text conditioning only.

    It has no text mask: padded positions are zeroed and attended to. Its pooled text vector is the mean over the
    real tokens.
    """

    labels: ClassVar[Use] = "refused"
    text: ClassVar[Use] = "required"

    kind: Literal["sd3_transformer2d"] = Field("sd3_transformer2d", description="diffusers SD3Transformer2DModel.")
    sample_size: int = Field(64, ge=1, description="Side of the latent that positions are centred on.")
    max_size: int = Field(96, ge=1, description="Largest latent side, counted in patches.")
    heads: int = Field(12, ge=1, description="Attention heads per block.")
    head_dim: int = Field(64, ge=4, multiple_of=4, description="Channels per head.")
    depth: int = Field(12, ge=1, description="Number of joint blocks.")
    patch: int = Field(2, ge=1, description="Side of the square of latent pixels that makes one token.")
    qk_norm: bool = Field(True, description="RMS-normalise queries and keys, as SD 3.5 does.")
    activation_checkpointing: bool = Field(
        False, description="Recompute each block in the backward pass: less memory, more compute."
    )

    @property
    def sides(self) -> Sides:
        return Sides("max_size", self.patch, most=self.max_size * self.patch)


class PublishedConfig(NetworkConfig):
    """A network of diffusers as published models have it: its class and config.json, most often out of `init`.

    It reads text and sizes as that class was trained to, see `pipeline.model.adapters`.
    """

    model_config = ConfigDict(validate_by_name=True)

    kind: Literal["diffusers"] = Field("diffusers", description="A class of diffusers, as published models have it.")
    class_name: PublishedClass | None = Field(
        None, alias="class", description="Its name in diffusers; null: what model.init.uri says."
    )
    config: dict[str, Any] | None = Field(
        None, description="The arguments that make it, as in its config.json; null: what model.init.uri says."
    )
    distilled_guidance: float = Field(
        1.0,
        ge=0,
        description="What a guidance-distilled network (guidance_embeds, as FLUX has it) is told while it trains.",
    )
    activation_checkpointing: bool = Field(
        False, description="Recompute each block in the backward pass: less memory, more compute."
    )

    @model_validator(mode="after")
    def _known(self) -> PublishedConfig:
        if (self.class_name is None) != (self.config is None):
            raise ValueError("class and config belong together: give both, or neither and init")
        if self.class_name is None and self.init is None:
            raise ValueError("it needs init.uri, or class and config")
        return self

    @property
    def arguments(self) -> dict[str, Any]:
        """Its configuration; only of one that is known."""
        assert self.config is not None
        return self.config

    @property
    def uses(self) -> tuple[Use, Use]:
        text: Use = "refused" if self.class_name in ("UNet2DModel", "DiTTransformer2DModel") else "required"
        return "refused" if self.num_classes is None else "required", text

    @property
    def num_classes(self) -> int | None:
        """Classes that it has embeddings for; None without."""
        if self.class_name == "DiTTransformer2DModel":
            return int(self.arguments.get("num_embeds_ada_norm") or 1000)
        classes = self.arguments.get("num_class_embeds") if str(self.class_name).startswith("UNet") else None
        return None if classes is None else int(classes)

    @property
    def latent_channels(self) -> int:
        """Of the latents; a Flux sees squares of 2 x 2 latent pixels, the latents of a Flux 2 are such squares."""
        default = {
            "UNet2DModel": 3,
            "SD3Transformer2DModel": 16,
            "FluxTransformer2DModel": 64,
            "Flux2Transformer2DModel": 128,
        }
        channels = self.arguments.get("in_channels") or default.get(str(self.class_name), 4)
        return int(channels) // (4 if self.class_name == "FluxTransformer2DModel" else 1)

    @property
    def micro_conditions(self) -> bool:
        if self.class_name == "PixArtTransformer2DModel":
            asked = self.arguments.get("use_additional_conditions")
            return bool(self.arguments.get("sample_size", 128) == 128 if asked is None else asked)
        return self.class_name == "UNet2DConditionModel" and bool(self.arguments.get("addition_embed_type"))

    @property
    def distilled(self) -> bool:
        return bool(self.arguments.get("guidance_embeds", self.class_name == "Flux2Transformer2DModel"))

    @property
    def pooled_dim(self) -> int | None:
        if self.arrangement == "sdxl":
            embedded = int(self.arguments.get("projection_class_embeddings_input_dim") or 2816)
            return embedded - 6 * int(self.arguments.get("addition_time_embed_dim") or 256)
        default = {"sd3": 2048, "flux": 768}.get(self.arrangement)
        return None if default is None else int(self.arguments.get("pooled_projection_dim") or default)

    @property
    def arrangement(self) -> Arrangement:
        """How text encoders become its text."""
        if self.uses[1] == "refused":
            return "none"
        if self.class_name == "UNet2DConditionModel":
            return "sdxl" if self.micro_conditions else "single"
        named: dict[str, Arrangement] = {"SD3Transformer2DModel": "sd3", "FluxTransformer2DModel": "flux"}
        return named.get(str(self.class_name), "single")

    @property
    def padding(self) -> Padding:
        """What padding of its text is to it, as `text.config.TextEncoderConfig` says it."""
        if self.class_name in ("PixArtTransformer2DModel", "SanaTransformer2DModel"):
            return "masked"
        return "shown" if self.class_name == "Flux2Transformer2DModel" else "attended"

    @property
    def text_dim(self) -> int | None:
        """Width of a text state; None for one that reads none."""
        names = {
            "UNet2DConditionModel": ("cross_attention_dim", 1280),
            "SD3Transformer2DModel": ("joint_attention_dim", 4096),
            "FluxTransformer2DModel": ("joint_attention_dim", 4096),
            "Flux2Transformer2DModel": ("joint_attention_dim", 15360),
            "PixArtTransformer2DModel": ("caption_channels", 4096),
            "SanaTransformer2DModel": ("caption_channels", 2304),
        }
        if self.class_name not in names:
            return None
        name, default = names[self.class_name]
        return int(self.arguments.get(name) or default)

    @property
    def sides(self) -> Sides:
        if self.class_name == "DiTTransformer2DModel":
            size = int(self.arguments.get("sample_size") or 32)
            return Sides("sample_size", int(self.arguments.get("patch_size") or 2), only=size)
        if self.class_name == "FluxTransformer2DModel":
            return Sides("patch_size", 2)
        if str(self.class_name).startswith("UNet"):
            return _of_levels(self.arguments.get("block_out_channels") or (0,) * 4)
        single = self.class_name in ("SanaTransformer2DModel", "Flux2Transformer2DModel")
        patch = int(self.arguments.get("patch_size") or (1 if single else 2))
        most = self.arguments.get("pos_embed_max_size") if self.class_name == "SD3Transformer2DModel" else None
        return Sides("pos_embed_max_size" if most else "patch_size", patch, most=most and int(most) * patch)


class InstalledConfig(NetworkConfig):
    """A network of an installed package: its entry point in the group `latentloom.models` makes it.

    The entry point is called with latent_channels, num_classes and text_dim (None where the data have none) and the
    options, and returns an nn.Module with the calling convention of `pipeline.model`, its parameters initialised.
    """

    kind: Literal["installed"] = Field("installed", description="A network that an installed package offers.")
    name: str = Field(..., min_length=1, description="Its entry point in the group latentloom.models.")
    options: dict[str, JsonValue] = Field({}, description="Keyword arguments for it, as that package describes them.")
    multiple: int = Field(1, ge=1, description="Sides of latents that it takes are multiples of this.")

    @property
    def sides(self) -> Sides:
        return Sides("multiple", self.multiple)


ModelConfig = Annotated[
    DiTConfig
    | UNet2DConfig
    | UNet2DConditionConfig
    | DiTTransformer2DConfig
    | SD3Transformer2DConfig
    | PublishedConfig
    | InstalledConfig,
    Field(discriminator="kind"),
]


GROUP = "latentloom.models"


def installed_network(name: str) -> EntryPoint:
    """The entry point of a network, not loaded; ConfigError when no installed package has it."""
    return installed_plugin(GROUP, name, key="model.name")


def kinds_for(*, labels: bool, text: bool) -> str:
    """The own kinds that learn from just these conditions, for a message."""
    networks: tuple[type[NetworkConfig], ...] = get_args(get_args(ModelConfig)[0])
    ours = [network for network in networks if network not in (InstalledConfig, PublishedConfig)]
    fitting = [n for n in ours if _misfit(n.labels, n.text, labels=labels, text=text) is None]
    return ", ".join(network.model_fields["kind"].default for network in fitting)


def _of_levels(channels: Sequence[int]) -> Sides:
    return Sides("block_out_channels", 1 << (len(channels) - 1))


def _check_levels(
    channels: tuple[int, ...], attention: tuple[bool, ...], divisor: int, *, name: str = "norm_num_groups"
) -> None:
    if len(attention) != len(channels):
        raise ValueError(f"attention has {len(attention)} entries, block_out_channels has {len(channels)}: one each")
    wrong = [width for width in channels if width % divisor]
    if wrong:
        raise ValueError(f"{name} {divisor} must divide every entry of block_out_channels, not so {wrong}")
