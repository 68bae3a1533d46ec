"""Vectors of CLIP and of T5's encoder from the published implementation, transformers.

`python -m tests.text_vectors FILE` (with torch and transformers installed, which no test needs)
fills small ones with the numbers of `array`, runs them in float64 and writes what
`tests/text_vectors.npz` holds: outputs, the names and shapes of the released sizes, buckets of
relative positions, and what CLIP's tokenizer makes of TEXTS. Written with torch 2.13.0,
transformers 5.23.0.
"""

import json
import pathlib
import sys
import tempfile

import numpy as np

from tests.autoencoder_vectors import uniform

EOS = 38  # of CLIP; no id is larger but 39, which legacy pooling takes for it
TEXT = dict(
    vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
    num_attention_heads=2, max_position_embeddings=8,
)  # fmt: skip
VISION = dict(
    hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, image_size=8,
    patch_size=4,
)  # fmt: skip
PROJECTION = 12
T5 = dict(
    vocab_size=40, d_model=16, d_kv=6, d_ff=20, num_layers=2, num_heads=3,
    feed_forward_proj="gated-gelu", relative_attention_num_buckets=8,
    relative_attention_max_distance=12,
)  # fmt: skip
L14 = dict(
    text_config=dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12),
    vision_config=dict(
        hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_hidden_layers=24,
        patch_size=14,
    ),
    projection_dim=768,
)  # fmt: skip
XXL = dict(
    d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
)
DISTANCES = 200  # positions whose buckets are stored
TEXTS = (
    "a photo of a cat", "  Two   DOGS,\n playing!!  ", "it's 2026; we'll see the cat's 100% naïve",
    "ÉCOLE été e\u0301 ΑΣ 一二 ½ Ⅻ ₂ ١٢", "dogs🐶🐶 don't --- \u00a0_under_score_", "",
    "'S 'sx ''t", "end<|endoftext|>of", "the photograph the photographs theatre",
)  # fmt: skip
MERGES = (
    "t h", "th e</w>", "th e", "a t</w>", "c at</w>", "p h", "o t", "ph ot", "phot o</w>",
    "d o", "do g", "dog s</w>", "o f</w>", "n a", "' s</w>", "! !</w>", "Ã ©</w>", "s e",
)  # fmt: skip


def array(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The parameter of that name: activations of about one size, attention that attends."""
    if len(shape) < 2:
        middle = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        return np.asarray(middle + 0.5 * uniform(name, *shape), np.float32)
    tables = ("embedding.weight", "shared.weight", "embed_tokens.weight", "attention_bias.weight")
    if name.endswith(tables):
        return 1.5 * uniform("shared.weight" if "embed_tokens" in name else name, *shape)
    gain = 2.0 if any(part in name for part in ("q_proj", "k_proj", ".q.", ".k.")) else 1.0
    return gain * uniform(name, *shape) * np.float32((3 / np.prod(shape[1:])) ** 0.5)


def clip_ids() -> np.ndarray:
    """[3, 8]: begin, words, end, padding that is the end again, 0, or none."""
    ids = 1 + (np.abs(uniform("clip ids", 3, 8)) * 36).astype(np.int32)
    ids[:, 0] = 37
    ids[0, 4:] = EOS
    ids[1, 6], ids[1, 7] = EOS, 0
    ids[2, 7], ids[2, 3] = EOS, 39  # legacy pooling takes the largest id, at 3
    return ids


def t5_ids() -> tuple[np.ndarray, np.ndarray]:
    """ids, mask [2, 20]: a whole row, and one with padding."""
    ids = 2 + (np.abs(uniform("t5 ids", 2, 20)) * 37).astype(np.int32)
    mask = np.arange(20) < np.array([[20], [13]])
    return np.where(mask, ids, 0), mask


def images() -> np.ndarray:
    """[2, 8, 8, 3] in [-1, 1]."""
    return uniform("clip images", 2, 8, 8, 3)


def alphabet() -> list[str]:
    """A character for each byte, as byte-level vocabularies have since GPT-2."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in shown] + [chr(256 + i) for i in range(256 - len(shown))]


def write_tokenizer(folder: pathlib.Path) -> None:
    """vocab.json and merges.txt of a small vocabulary for CLIP's tokenizer."""
    letters = alphabet()
    words = ["".join(pair.split(" ")) for pair in MERGES]
    tokens = [*letters, *(c + "</w>" for c in letters), *words]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    merges = "\n".join(["#version: 0.2", *MERGES, ""])
    (folder / "merges.txt").write_text(merges, encoding="utf-8")


def main(path: str) -> None:
    import torch
    from transformers import (
        CLIPConfig,
        CLIPModel,
        CLIPTokenizer,
        T5Config as PublishedT5,
        T5EncoderModel,
    )
    from transformers.models.t5.modeling_t5 import T5Attention

    from lintime.model.nets.clip import PIXEL_MEAN, PIXEL_STD

    def filled(net):
        state = net.state_dict()
        state = {n: torch.from_numpy(array(n, tuple(a.shape))) for n, a in state.items()}
        net.load_state_dict(state)
        return net.double().eval()

    def clip(act, eos):
        settings = dict(hidden_act=act)
        config = CLIPConfig(
            text_config=TEXT | settings | dict(eos_token_id=eos, bos_token_id=37, pad_token_id=0),
            vision_config=VISION | settings, projection_dim=PROJECTION,
            attn_implementation="eager",
        )  # fmt: skip
        return filled(CLIPModel(config))

    out = {}
    keep = lambda a: a.detach().numpy().astype(np.float32)
    ids = torch.from_numpy(clip_ids()).long()
    pixels = ((images().astype(np.float64) + 1) / 2 - PIXEL_MEAN) / PIXEL_STD
    pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    torch.set_default_dtype(torch.float64)
    with torch.no_grad():
        for act, eos in (("quick_gelu", EOS), ("gelu", 2)):
            net = clip(act, eos)
            text, image = net.get_text_features(ids), net.get_image_features(pixels)
            out[f"states_{act}"] = keep(text.last_hidden_state)
            out[f"text_{act}"], out[f"image_{act}"] = (keep(f.pooler_output) for f in (text, image))
            out[f"logits_{act}"] = keep(net(input_ids=ids, pixel_values=pixels).logits_per_image)
            out[f"pooled_{act}"] = keep(net.text_model(ids).pooler_output)
        t5_in, mask = (torch.from_numpy(a).long() for a in t5_ids())
        net = filled(T5EncoderModel(PublishedT5(**T5, attn_implementation="eager")))
        out["t5"] = keep(net(t5_in, attention_mask=mask).last_hidden_state)
    torch.set_default_dtype(torch.float32)
    offsets = torch.arange(-DISTANCES, DISTANCES + 1)
    buckets = lambda *sizes: T5Attention._relative_position_bucket(offsets, True, *sizes)
    out["buckets"] = np.stack([buckets(32, 128), buckets(8, 12)]).astype(np.int8)
    with torch.device("meta"):
        released = CLIPModel(CLIPConfig(**L14)), T5EncoderModel(PublishedT5(**XXL))
    for name, net in zip(("clip", "t5"), released):
        state = sorted(net.state_dict().items())
        out[f"released_{name}"] = "\n".join(f"{n} {tuple(a.shape)}" for n, a in state)
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(pathlib.Path(folder))
        tokenizer = CLIPTokenizer.from_pretrained(folder)
        for i, text in enumerate(TEXTS):
            out[f"tokens_{i}"] = np.array(tokenizer(text).input_ids, np.int16)
    np.savez_compressed(path, **out)


if __name__ == "__main__":
    main(sys.argv[1])
