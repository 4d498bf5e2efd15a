"""Sizes of the models. A config is all that a model's constructor takes; the presets are FLUX.1's own (ENGINE.md 1)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self, TypeVar

from engine.errors import ConfigError

VARIANTS: Mapping[int, str] = {128: "FLUX.1 Canny or Depth", 384: "FLUX.1 Fill"}
"""Input channels of the transformer that tell another variant of the model."""


def _check_counts(config: FlowConfig | AutoencoderConfig, *names: str) -> None:
    """Raise `ConfigError` unless these entries are whole numbers from 1 (depths from 0), alone or in a tuple."""
    for name in names:
        value = getattr(config, name)
        least = 0 if name.startswith("depth") else 1
        for number in value if isinstance(value, tuple) else (value,):
            if type(number) is not int or number < least:
                raise ConfigError(f"{name} is {value!r}; whole numbers from {least} are needed")


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowConfig:
    """The rectified-flow transformer."""

    in_channels: int = 64
    """Width of a packed token: latent channels x 2 x 2."""
    hidden_size: int = 3072
    num_heads: int = 24
    depth_double: int = 19
    """Blocks with separate weights for text and image."""
    depth_single: int = 38
    """Blocks on the joined sequence."""
    mlp_ratio: float = 4.0
    text_dim: int = 4096
    """Width of the T5 features."""
    pooled_dim: int = 768
    """Width of the pooled CLIP feature."""
    axes_dims: tuple[int, int, int] = (16, 56, 56)
    """Share of the head width that rotates with (time index, row, column); each even, together the head width."""
    theta: float = 10_000.0
    guidance_embed: bool = True
    """Whether the guidance scale is embedded (dev models, guidance-distilled)."""

    def __post_init__(self) -> None:
        _check_counts(self, "in_channels", "hidden_size", "num_heads", "depth_double", "depth_single")
        _check_counts(self, "text_dim", "pooled_dim", "axes_dims")
        if self.hidden_size % self.num_heads:
            raise ConfigError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if len(self.axes_dims) != 3 or sum(self.axes_dims) != self.head_dim or any(dim % 2 for dim in self.axes_dims):
            raise ConfigError(
                f"axes_dims {self.axes_dims} must be three, even, and sum to the head width {self.head_dim}"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def mlp_size(self) -> int:
        return int(self.hidden_size * self.mlp_ratio)

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> Self:
        """From `transformer/config.json` (FluxTransformer2DModel)."""
        _check_class(config, "FluxTransformer2DModel")
        try:
            heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
            if type(heads) is not int or type(head_dim) is not int:
                raise TypeError(f"num_attention_heads is {heads!r}, attention_head_dim is {head_dim!r}")
            if config.get("patch_size", 1) != 1:
                raise ConfigError(f"patch_size {config['patch_size']} is not supported; FLUX.1 has 1")
            if config.get("out_channels") not in (None, config["in_channels"]):
                variant = VARIANTS.get(config["in_channels"], "another variant")
                raise ConfigError(
                    f"in_channels {config['in_channels']} and out_channels {config['out_channels']} are those of "
                    f"{variant}, not of Kontext or dev"
                )
            return cls(
                in_channels=config["in_channels"],
                hidden_size=heads * head_dim,
                num_heads=heads,
                depth_double=config["num_layers"],
                depth_single=config["num_single_layers"],
                text_dim=config["joint_attention_dim"],
                pooled_dim=config["pooled_projection_dim"],
                axes_dims=tuple(config.get("axes_dims_rope", (16, 56, 56))),
                guidance_embed=config.get("guidance_embeds", False),
            )
        except KeyError as error:
            raise ConfigError(f"transformer config lacks {error}") from error
        except TypeError as error:
            raise ConfigError(f"transformer config has an entry of a wrong type ({error})") from error

    def to_diffusers(self) -> dict[str, Any]:
        """The content of `transformer/config.json`."""
        if self.mlp_ratio != 4.0:
            raise ConfigError(f"the diffusers layout knows mlp_ratio 4 only, not {self.mlp_ratio}")
        return {
            "_class_name": "FluxTransformer2DModel",
            "attention_head_dim": self.head_dim,
            "axes_dims_rope": list(self.axes_dims),
            "guidance_embeds": self.guidance_embed,
            "in_channels": self.in_channels,
            "joint_attention_dim": self.text_dim,
            "num_attention_heads": self.num_heads,
            "num_layers": self.depth_double,
            "num_single_layers": self.depth_single,
            "out_channels": None,
            "patch_size": 1,
            "pooled_projection_dim": self.pooled_dim,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoencoderConfig:
    """The convolutional autoencoder, 8x smaller in each direction with four levels."""

    image_channels: int = 3
    block_channels: tuple[int, ...] = (128, 256, 512, 512)
    """Width of each level, from pixels inwards; each level but the last halves the sides."""
    res_blocks: int = 2
    """Residual blocks of a level; the decoder has one more."""
    latent_channels: int = 16
    groups: int = 32
    """Of every GroupNorm."""
    scale: float = 0.3611
    """Latents are `scale * (mean - shift)`."""
    shift: float = 0.1159
    sample_size: int = 1024
    """Side in pixels of the square that the model was trained for; its square is the model's native area."""

    def __post_init__(self) -> None:
        _check_counts(self, "image_channels", "block_channels", "res_blocks", "latent_channels", "groups")
        _check_counts(self, "sample_size")
        if len(self.block_channels) != 4:
            raise ConfigError(f"block_channels {self.block_channels}: four levels are needed, for 8x smaller latents")
        for name, value in (("scale", self.scale), ("shift", self.shift)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ConfigError(f"{name} of the latents is {value!r}; a number is needed")
        if self.scale == 0:
            raise ConfigError("scale of the latents is 0")
        for width in self.block_channels:
            if width % self.groups:
                raise ConfigError(f"block_channels {self.block_channels} must be multiples of groups {self.groups}")

    @property
    def factor(self) -> int:
        """Pixels of a side to one latent."""
        return int(2 ** (len(self.block_channels) - 1))

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> Self:
        """From `vae/config.json` (AutoencoderKL)."""
        _check_class(config, "AutoencoderKL")
        if config.get("use_quant_conv", True) or config.get("use_post_quant_conv", True):
            raise ConfigError("vae config asks for quant convolutions, which FLUX.1's autoencoder does not have")
        if config.get("act_fn", "silu") != "silu" or not config.get("mid_block_add_attention", True):
            raise ConfigError("vae config asks for another activation or no attention; FLUX.1's has SiLU and attention")
        try:
            return cls(
                image_channels=config["in_channels"],
                block_channels=tuple(config["block_out_channels"]),
                res_blocks=config["layers_per_block"],
                latent_channels=config["latent_channels"],
                groups=config["norm_num_groups"],
                scale=config["scaling_factor"],
                shift=config["shift_factor"],
                sample_size=config.get("sample_size", 1024),
            )
        except KeyError as error:
            raise ConfigError(f"vae config lacks {error}") from error
        except TypeError as error:
            raise ConfigError(f"vae config has an entry of a wrong type ({error})") from error

    def to_diffusers(self) -> dict[str, Any]:
        """The content of `vae/config.json`."""
        levels = len(self.block_channels)
        return {
            "_class_name": "AutoencoderKL",
            "act_fn": "silu",
            "block_out_channels": list(self.block_channels),
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "force_upcast": True,
            "in_channels": self.image_channels,
            "latent_channels": self.latent_channels,
            "layers_per_block": self.res_blocks,
            "mid_block_add_attention": True,
            "norm_num_groups": self.groups,
            "out_channels": self.image_channels,
            "sample_size": self.sample_size,
            "scaling_factor": self.scale,
            "shift_factor": self.shift,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "use_post_quant_conv": False,
            "use_quant_conv": False,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Everything about a model's sizes that its BFL files do not say themselves."""

    flow: FlowConfig = field(default_factory=FlowConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)

    def __post_init__(self) -> None:
        if self.flow.in_channels != 4 * self.autoencoder.latent_channels:
            variant = VARIANTS.get(self.flow.in_channels)
            raise ConfigError(
                f"a packed token has 4 x {self.autoencoder.latent_channels} channels, not {self.flow.in_channels}"
                + (f", which is {variant}; only Kontext and dev are supported" if variant else "")
            )

    @property
    def native_area(self) -> int:
        """Pixels of an image of the size that the model was trained for."""
        return self.autoencoder.sample_size**2

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """From `config.json` beside BFL files: `{"flow": {...}, "autoencoder": {...}}` in the names of these classes.

        `transformer` and `vae` in diffusers names are taken as well.
        """
        known = {"flow", "autoencoder", "transformer", "vae"}
        if unknown := set(data) - known:
            raise ConfigError(f"unknown entries {sorted(unknown)} in the model config; it has {sorted(known)}")
        flow = _section(FlowConfig, data.get("flow"), data.get("transformer"))
        autoencoder = _section(AutoencoderConfig, data.get("autoencoder"), data.get("vae"))
        return cls(flow=flow, autoencoder=autoencoder)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


_Config = TypeVar("_Config", FlowConfig, AutoencoderConfig)


def _check_class(config: Mapping[str, Any], wanted: str) -> None:
    found = config.get("_class_name", wanted)
    if found != wanted:
        raise ConfigError(f"the config is that of {found}; FLUX.1's is {wanted}")


def _section(kind: type[_Config], own: Mapping[str, Any] | None, diffusers: Mapping[str, Any] | None) -> _Config:
    if own is None:
        return kind() if diffusers is None else kind.from_diffusers(diffusers)
    if not isinstance(own, Mapping):
        raise ConfigError(f"{kind.__name__} is a mapping of names to sizes, not {own!r}")
    names = {entry.name for entry in fields(kind)}
    if unknown := set(own) - names:
        raise ConfigError(f"{kind.__name__} has no {sorted(unknown)}; it has {sorted(names)}")
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in own.items()}
    try:
        return kind(**values)
    except TypeError as error:
        raise ConfigError(f"{kind.__name__} has an entry of a wrong type ({error})") from error


KONTEXT_DEV = ModelConfig()
"""FLUX.1 Kontext [dev]: 11.9 B parameters, 1 megapixel."""

FLUX_DEV = ModelConfig()
"""FLUX.1 [dev]: the same sizes; a file alone cannot tell which of the two it is."""

PRESETS: Mapping[str, ModelConfig] = {"flux-kontext-dev": KONTEXT_DEV, "flux-dev": FLUX_DEV}
