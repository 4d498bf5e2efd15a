"""Text conditioning: T5 features and the pooled CLIP feature, through transformers (ENGINE.md 1.3).

Nothing is masked: every prompt is padded to one length, so prompts of different length batch freely, and a change of
that length changes the result.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer
from transformers.utils import logging as transformers_logging

from engine.errors import ConfigError, WeightsError
from engine.weights import READERS, ModelFiles, read_json, safetensors_files

MAX_TEXT_LENGTH = 512
CLIP_LENGTH = 77
MODEL_TYPES = {CLIPTextModel: ("clip_text_model", "clip"), T5EncoderModel: ("t5",)}


@dataclass(frozen=True, slots=True)
class TextFeatures:
    """What the transformer sees of one prompt."""

    t5: Tensor
    """(text_length, text_dim): last hidden state, padding included."""
    pooled: Tensor
    """(pooled_dim,): CLIP's state at the first end-of-text token, before any projection."""

    @property
    def nbytes(self) -> int:
        return self.t5.nbytes + self.pooled.nbytes

    def to(self, device: torch.device) -> TextFeatures:
        return TextFeatures(t5=self.t5.to(device), pooled=self.pooled.to(device))


class TextEncoder:
    """Both encoders and their tokenizers; encodes each distinct prompt once."""

    def __init__(
        self,
        clip: CLIPTextModel,
        t5: T5EncoderModel,
        tokenizers: Mapping[str, Path],
        *,
        text_length: int | None = None,
    ) -> None:
        """From models, and the folders of their tokenizers by the names `tokenizer` and `tokenizer_2`."""
        self.clip, self.t5, self._tokenizers = clip, t5, tokenizers
        self.clip_tokenizer = _tokenizer(CLIPTokenizer, tokenizers["tokenizer"])
        self.t5_tokenizer = _tokenizer(T5Tokenizer, tokenizers["tokenizer_2"])
        self.text_length = default_text_length(self.t5_tokenizer.model_max_length, text_length)

    @classmethod
    def load(cls, files: ModelFiles, *, device: torch.device, dtype: torch.dtype, text_length: int | None) -> Self:
        """Both encoders of a model, strictly."""
        clip = _load(CLIPTextModel, files.clip, device=device, dtype=dtype)
        t5 = _load(T5EncoderModel, files.t5, device=device, dtype=t5_dtype(dtype))
        for folder, width, wanted in (
            (files.clip, clip.config.hidden_size, files.config.flow.pooled_dim),
            (files.t5, t5.config.d_model, files.config.flow.text_dim),
        ):
            if width != wanted:
                raise WeightsError(f"{folder}: {width} wide, the transformer expects {wanted}; it is another model's")
        tokenizers = {"tokenizer": files.clip_tokenizer, "tokenizer_2": files.t5_tokenizer}
        return cls(clip, t5, tokenizers, text_length=text_length)

    def token_ids(self, prompts: str | list[str]) -> tuple[Tensor, Tensor]:
        """CLIP (count, 77) and T5 (count, text_length) ids, padded and cut."""
        options: dict[str, Any] = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        clip = self.clip_tokenizer(prompts, max_length=CLIP_LENGTH, **options)
        t5 = self.t5_tokenizer(prompts, max_length=self.text_length, **options)
        return clip.input_ids, t5.input_ids

    @torch.no_grad()
    def encode(self, prompt: str) -> TextFeatures:
        """Features of one prompt, padded (and cut) to `text_length` T5 tokens and 77 CLIP tokens.

        One prompt a pass: the features then do not depend on what else is encoded.
        """
        return self.encode_ids(*self.token_ids(prompt))

    @torch.no_grad()
    def encode_ids(self, clip_ids: Tensor, t5_ids: Tensor) -> TextFeatures:
        """Features of token ids (1, 77) and (1, text_length)."""
        pooled = self.clip(clip_ids.to(self.clip.device)).pooler_output
        t5 = self.t5(t5_ids.to(self.t5.device)).last_hidden_state
        return TextFeatures(t5=t5[0], pooled=pooled[0])

    def count_tokens(self, prompt: str) -> int:
        """T5 tokens of a prompt, its end token included; beyond `text_length` they are cut off."""
        return len(self.t5_tokenizer(prompt).input_ids)

    def save(self, folder: Path) -> None:
        """Write the four text folders of a diffusers layout."""
        self.clip.save_pretrained(folder / "text_encoder")
        self.t5.save_pretrained(folder / "text_encoder_2")
        for name, source in self._tokenizers.items():  # as they are: save_pretrained drops spiece.model
            shutil.copytree(source, folder / name, dirs_exist_ok=True)


def t5_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of T5 in a model of `dtype`: in fp16 its feed-forward overflows (transformers#5651)."""
    return torch.float32 if dtype == torch.float16 else dtype


def default_text_length(model_max_length: int, asked: int | None) -> int:
    """The T5 length to use: what was asked for, else the tokenizer's own when at most 512, else 512."""
    if asked is None:
        return model_max_length if 0 < model_max_length <= MAX_TEXT_LENGTH else MAX_TEXT_LENGTH
    if not 0 < asked <= MAX_TEXT_LENGTH:
        raise ConfigError(f"text_length {asked} is not between 1 and {MAX_TEXT_LENGTH}")
    return asked


def _tokenizer(kind: Any, folder: Path) -> Any:
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises Exception itself
        raise WeightsError(f"{folder}: no usable tokenizer ({error})") from error


def _load(kind: Any, folder: Path, *, device: torch.device, dtype: torch.dtype) -> Any:
    """A text encoder, strictly: transformers itself only logs names that are missing or too many."""
    found = read_json(folder / "config.json").get("model_type")
    if found not in MODEL_TYPES[kind]:
        raise ConfigError(f"{folder}/config.json: model_type is {found!r}; {' or '.join(MODEL_TYPES[kind])} is needed")
    safetensors_files(folder)  # a folder with pickles alone is refused by name
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        module, info = kind.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # told below, with names
            output_loading_info=True,
        )
    except Exception as error:  # transformers raises OSError, RuntimeError, SafetensorError and others alike
        raise WeightsError(f"{folder}: {error}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
    surplus = [name for name in info["unexpected_keys"] if not name.endswith(("embed_tokens.weight", "position_ids"))]
    if info["missing_keys"] or surplus or info.get("mismatched_keys"):
        raise WeightsError.mismatch(
            str(folder),
            missing=info["missing_keys"],
            surplus=surplus,
            shapes=[
                f"{name} {list(found)} instead of {list(wanted)}"
                for name, found, wanted in info.get("mismatched_keys", ())
            ],
        )
    parameters = list(module.parameters())
    with ThreadPoolExecutor(READERS) as pool:  # each lands in memory of its own; see weights.load_strictly
        copies = pool.map(lambda parameter: parameter.data.to(device, copy=True), parameters)
        for parameter, copy in zip(parameters, copies, strict=True):
            parameter.data = copy
    return module.to(device).requires_grad_(False).eval()


def clip_l_config() -> CLIPTextConfig:
    """The text half of openai/clip-vit-large-patch14: 123,060,480 parameters."""
    return CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768
    )


def t5_xxl_config() -> T5Config:
    """The encoder of google/t5-v1_1-xxl: 4,762,310,656 parameters."""
    return T5Config(
        d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu", vocab_size=32128
    )
