"""Frozen towers on small random weights, in the files that the real ones have."""

import json

import torch


def save_clip(path, with_vision=False):
    """The text tower alone, or a whole CLIP of pictures of 28 px."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = [*"abcdefghijklmnopqrstuvwxyz,", *(f"{c}</w>" for c in "abcdefghijklmnopqrstuvwxyz,")]
    vocabulary = {token: i for i, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    (path / "vocab.json").write_text(json.dumps(vocabulary))
    (path / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(path / "vocab.json"), str(path / "merges.txt")).save_pretrained(path)
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    ids = dict(bos_token_id=len(vocabulary) - 2, eos_token_id=len(vocabulary) - 1, pad_token_id=len(vocabulary) - 1)
    config = CLIPTextConfig(vocab_size=len(vocabulary), max_position_embeddings=77, **sizes, **ids)
    if not with_vision:
        CLIPTextModel(config).save_pretrained(path)
        return path
    vision = dict(**sizes, image_size=28, patch_size=14)
    both = CLIPConfig(text_config=config.to_dict(), vision_config=vision, projection_dim=8)
    CLIPModel(both).save_pretrained(path)
    CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(path)
    return path


def save_dinov2(path, **changes):
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_attention_heads=2, num_hidden_layers=2, image_size=42, patch_size=14)
    Dinov2Model(Dinov2Config(**sizes | changes)).save_pretrained(path)
    return path


def save_t5(path):
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz,"
    scores = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -4.0), *((letter, -3.0) for letter in letters)]
    T5TokenizerFast(vocab=scores, extra_ids=0).save_pretrained(path)
    torch.manual_seed(0)
    sizes = dict(vocab_size=len(scores), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    T5EncoderModel(T5Config(**sizes, feed_forward_proj="gated-gelu")).save_pretrained(path)
    return path


def save_autoencoder(path, **changes):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    sizes = dict(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )
    AutoencoderKL(**sizes, **changes).save_pretrained(path)
    return path


def copy_files(source, target):
    target.mkdir(exist_ok=True)
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
