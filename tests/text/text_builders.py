"""Tiny random encoders with their tokenizers on disk, and latent datasets with chosen captions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
)

from pipeline.storage.root import Root
from pipeline.store.ledger.identity import claim_identity
from pipeline.store.plan import append_version, read_plan
from pipeline.text.config import EmbedTextJobConfig
from pipeline.text.files import PROCESSOR
from tests.support.rows import IDENTITY, Listed, claim, committer, latent_rows

CLIP_LENGTH = 16
WIDTH = 32
WORDS = ["<pad>", "</s>", "<unk>", "a", "an", "the", "red", "blue", "green", "circle", "square", "of", "on", "and"]
WORDS += ["picture", "sky", "0", "1", "2", "3"]


def make_clip(folder: Path, seed: int = 0, *, whole: bool = False, projection: bool = False) -> Path:
    """A CLIP text model (or a whole CLIPModel, as hubs hold it) with a byte-level BPE tokenizer."""
    tokenizer = clip_tokenizer()
    torch.manual_seed(seed)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=CLIP_LENGTH,
        projection_dim=24,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    if whole:
        config = CLIPConfig(
            text_config=text.to_dict(), vision_config={**vision, "image_size": 8, "patch_size": 4}, projection_dim=24
        )
        model = CLIPModel(config)
    else:
        model = (CLIPTextModelWithProjection if projection else CLIPTextModel)(text)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def clip_tokenizer() -> CLIPTokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("r", "e"), ("re", "d</w>"), ("s", "k"), ("sk", "y</w>")]
    pieces = [*alphabet, *(c + "</w>" for c in alphabet), *(a + b for a, b in merges)]
    vocab = {piece: i for i, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=merges)


def make_t5(folder: Path, seed: int = 0, *, pad: bool = True, width: int = WIDTH) -> Path:
    """A T5 encoder with a word-level tokenizer that closes with </s>."""
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"eos_token": "</s>", "unk_token": "<unk>", **({"pad_token": "<pad>"} if pad else {})}
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=len(WORDS),
        d_model=width,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    T5EncoderModel(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(folder)
    return folder


# The turns of a talk, one of them begun and its thoughts left out on demand, as Qwen's own template has it.
CHAT = (
    "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{{ turn.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def _decoder(vocabulary: int, layers: int, width: int) -> dict[str, int]:
    """The sizes of a small language model."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }


def make_qwen3(folder: Path, seed: int = 0, *, layers: int = 28, width: int = 16, chat: str | None = CHAT) -> Path:
    """A Qwen 3 with a byte-level BPE tokenizer that knows how a talk is written."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("r", "e"), ("re", "d"), ("s", "k"), ("sk", "y")]
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {piece: i for i, piece in enumerate([*alphabet, *(a + b for a, b in merges), *marks])}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges, extra_special_tokens=marks[1:])
    tokenizer.chat_template = chat
    torch.manual_seed(seed)
    config = Qwen3Config(
        **_decoder(len(tokenizer), layers, width),
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# A talk as Mistral's own template writes it, which begins with the token of the beginning.
TALK = (
    "{{ bos_token }}{% for turn in messages %}{% if turn.role == 'system' %}"
    "[SYSTEM_PROMPT]{{ turn.content[0].text }}[/SYSTEM_PROMPT]"
    "{% else %}[INST]{{ turn.content[0].text }}[/INST]{% endif %}{% endfor %}"
)


def make_mistral3(folder: Path, seed: int = 0, *, layers: int = 31, width: int = 16) -> Path:
    """A Mistral 3 of pictures and text in text_encoder/, and what its processor is saved as in tokenizer/.

    As FLUX.2 dev holds them. The processor itself, a PixtralProcessor, is made only where torchvision is installed.
    """
    marks = ["<unk>", "<s>", "</s>", "<pad>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
    marks += ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({piece: i for i, piece in enumerate([*marks, *alphabet])}, [], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        padding_side="left",
        extra_special_tokens=marks[4:],
    )
    tokenizer.chat_template = TALK
    torch.manual_seed(seed)
    text = MistralConfig(
        **_decoder(len(tokenizer), layers, width),
    )
    vision = PixtralVisionConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = Mistral3Config(text_config=text.to_dict(), vision_config=vision.to_dict(), image_token_index=8)
    Mistral3ForConditionalGeneration(config).save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    processor = {"processor_class": "PixtralProcessor", "patch_size": 14, "image_token": "[IMG]"}
    (folder / "tokenizer" / PROCESSOR).write_text(json.dumps(processor))
    return folder


def make_latents(uri: Path, units: Sequence[Sequence[str | None]]) -> str:
    """A latent dataset with one unit for each list of captions; called again, it adds units to what is there."""
    root = Root(str(uri))
    claim_identity(root, IDENTITY)
    plan = read_plan(root)
    first = plan.next_unit
    generation = claim(root)
    entries = [[Listed(f"{first + u:04d}/{r:04d}") for r in range(len(rows))] for u, rows in enumerate(units)]
    append_version(plan, entries, source={"uri": "mem"}, generation=generation.number)
    for u, captions in enumerate(units, first):
        rows = latent_rows([(u, r) for r in range(len(captions))])
        at = rows.schema.get_field_index("caption")
        rows = rows.set_column(at, rows.schema.field(at), pa.array(list(captions), pa.string()))
        committer(root, generation).commit(rows, None, {})
    generation.close({"status": "done"})
    return str(uri)


def job_config(data_uri: str, encoders: Sequence[dict[str, object]], **embed: int) -> EmbedTextJobConfig:
    return EmbedTextJobConfig.model_validate_json(
        json.dumps(
            {
                "data": {"uri": data_uri},
                "encoders": list(encoders),
                "embed": {"batch_size": 4, "unit_captions": 8, **embed},
                "device": "cpu",
                "threads": 1,
                "tracking": {"enabled": False},
            },
            default=str,
        )
    )
