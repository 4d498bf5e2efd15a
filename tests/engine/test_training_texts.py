"""Tokenizers made from the prompts' own words, as transformers reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, CLIPTokenizer, T5Tokenizer

from engine.training.flow import FlowWithText
from engine.training.instructions import corpus, random_example
from engine.training.texts import TEXT_LENGTH, make_clip, make_clip_tokenizer, make_t5, make_t5_tokenizer

DEMO = (
    "Remove the background and place the product on plain white.",
    "Remove the background and place the mug on plain white.",
    "Change the background to an orange studio sweep.",
    "make the mug red and put it on a blue background",
    "Add white stripes.",
)
UNSEEN = "Embroider «Zoë» 42× in quirky 漢字 (fuzzy)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers")
    lines = corpus()
    make_clip_tokenizer(lines, folder / "tokenizer")
    make_t5_tokenizer(lines, folder / "tokenizer_2")
    return folder


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    rng = np.random.default_rng(9)
    return [*DEMO, *(random_example(rng).instruction for _ in range(500))]


def test_the_t5_tokenizer_covers_every_prompt(folder: Path, prompts: list[str]) -> None:
    tokenizer = T5Tokenizer.from_pretrained(folder / "tokenizer_2", local_files_only=True)
    assert tokenizer.model_max_length == TEXT_LENGTH
    for prompt in prompts:
        ids = tokenizer(prompt, truncation=False, verbose=False).input_ids
        assert tokenizer.unk_token_id not in ids
        assert ids[-1] == tokenizer.eos_token_id == 1
        assert tokenizer.decode(ids, skip_special_tokens=True) == prompt
    assert all(len(tokenizer(prompt).input_ids) <= TEXT_LENGTH for prompt in DEMO)
    lengths = sorted(len(tokenizer(prompt, verbose=False).input_ids) for prompt in prompts)
    assert lengths[int(0.98 * len(lengths))] <= TEXT_LENGTH  # a few of the longest lose the end of "keep ..."
    assert tokenizer.pad_token_id == 0


def test_the_clip_tokenizer_covers_every_prompt(folder: Path, prompts: list[str]) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert tokenizer.pad_token_id == end
    for prompt in prompts:
        ids = tokenizer(prompt, padding="max_length", max_length=77).input_ids
        assert len(ids) == 77
        assert ids[0] == start
        words = ids[1 : ids.index(end)]
        assert tokenizer.decode(words).replace(" ", "") == prompt.lower().replace(" ", "")


def test_words_of_the_prompts_are_few_tokens(folder: Path, prompts: list[str]) -> None:
    for kind, name in ((CLIPTokenizer, "tokenizer"), (T5Tokenizer, "tokenizer_2")):
        tokenizer = kind.from_pretrained(folder / name, local_files_only=True)
        words = sum(len(prompt.split()) for prompt in prompts)
        assert sum(len(tokenizer(prompt).input_ids) for prompt in prompts) < 2 * words


def test_words_never_seen_are_spelled_not_lost(folder: Path) -> None:
    clip = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    ids = clip(UNSEEN).input_ids
    assert ids.count(clip.eos_token_id) == 1
    assert clip.decode(ids[1:-1]).replace(" ", "") == UNSEEN.lower().replace(" ", "")
    t5 = T5Tokenizer.from_pretrained(folder / "tokenizer_2", local_files_only=True)
    assert t5("quirky fuzzy jazz").input_ids.count(t5.unk_token_id) == 0


def test_auto_classes_find_them(folder: Path) -> None:
    for name in ("tokenizer", "tokenizer_2"):
        tokenizer = AutoTokenizer.from_pretrained(folder / name, local_files_only=True)
        assert tokenizer("make it red").input_ids


def test_a_run_that_goes_on_keeps_its_tokenizers(tmp_path: Path, prompts: list[str]) -> None:
    """Made again, equally frequent pieces change places, and a trained model would read other words."""
    first = FlowWithText.new(tmp_path).text.token_ids(prompts)
    second = FlowWithText.new(tmp_path).text.token_ids(prompts)
    for before, after in zip(first, second, strict=True):
        assert torch.equal(before, after)


def test_the_encoders_know_every_token_and_the_right_end(folder: Path) -> None:
    clip_tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    clip = make_clip(clip_tokenizer)
    assert clip.config.vocab_size == len(clip_tokenizer)
    assert clip.config.eos_token_id == clip_tokenizer.eos_token_id
    t5_tokenizer = T5Tokenizer.from_pretrained(folder / "tokenizer_2", local_files_only=True)
    assert make_t5(t5_tokenizer).config.vocab_size >= len(t5_tokenizer)
