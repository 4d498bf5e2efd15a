"""Small text encoders and tokenizers, made from the prompts' own words, in the layout of the real ones.

CLIP: byte-level BPE with `</w>`, 77 positions, end-of-text doubles as padding. T5: a sentencepiece unigram model. Both
spell words that they have never seen.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

import sentencepiece
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

TEXT_LENGTH = 40
"""T5 tokens of the shipped model; written into `tokenizer_2` as its `model_max_length`."""
START, END = "<|startoftext|>", "<|endoftext|>"
CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def make_clip_tokenizer(lines: Sequence[str], folder: Path, *, vocabulary: int = 900) -> CLIPTokenizer:
    """Train and write `tokenizer/`."""
    tokenizer = Tokenizer(models.BPE(unk_token=END, end_of_word_suffix="</w>", fuse_unk=False))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    words = sorted(model["vocab"], key=model["vocab"].get)
    words += [f"{letter}</w>" for letter in sorted(pre_tokenizers.ByteLevel.alphabet()) if f"{letter}</w>" not in words]
    vocabulary_of = {word: index for index, word in enumerate([*words, START, END])}  # CLIP's come last
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary_of, ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "CLIPTokenizer",
                "model_max_length": 77,
                "bos_token": START,
                "eos_token": END,
                "unk_token": END,
                "pad_token": END,
            },
            indent=2,
        )
    )
    made: CLIPTokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    made.save_pretrained(folder)
    return made


def make_t5_tokenizer(lines: Sequence[str], folder: Path, *, vocabulary: int = 600) -> T5Tokenizer:
    """Train and write `tokenizer_2/`, with `spiece.model` beside `tokenizer.json` as the published one has."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=out,
        model_type="unigram",
        vocab_size=vocabulary,
        hard_vocab_limit=False,
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        pad_piece="<pad>",
        num_threads=1,
        minloglevel=2,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())
    scored = [(pieces.id_to_piece(index), pieces.get_score(index)) for index in range(pieces.get_piece_size())]
    made = T5Tokenizer(vocab=scored, extra_ids=0, model_max_length=TEXT_LENGTH, padding_side="right")
    made.save_pretrained(folder)
    (folder / "spiece.model").write_bytes(out.getvalue())
    return made


def make_clip(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A pooled text feature 64 wide."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            projection_dim=64,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_t5(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """Token features 128 wide."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=128,
            d_kv=32,
            d_ff=256,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )
