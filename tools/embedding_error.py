"""Cost of 8 bits: the error of `i8b64` on the caption embeddings of a set that was written in fp16.

    python tools/embedding_error.py data/quickstart/validation

Prints the relative error (root mean square of the error / that of the values) and the largest error in units of the
values' standard deviation, over all values that are not 0 (padding of MiniLM is 0 and is kept exactly). Of several
captions a sample all count.
"""

from pathlib import Path

import numpy as np
import torch

from mdit import cli
from mdit.config import UserError
from mdit.data.manifest import MANIFEST
from mdit.data.quantise import dequantise, quantise
from mdit.data.shards import open_dataset


def main(arguments: list[str] | None = None) -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--samples", type=cli.whole(1), default=2048, help="at most so many, evenly spread")
    args = parser.parse_args(arguments)
    directory, samples = args.directory, args.samples
    dataset = open_dataset(directory)
    if dataset.layout.embeddings != "f16":
        raise UserError(f"{directory / MANIFEST}: embeddings is {dataset.layout.embeddings!r}, expected 'f16'")
    length, channels = dataset.embedding_shape
    dataset.layout.model_copy(update={"embeddings": "i8b64"}).check()
    chosen = np.linspace(0, dataset.samples - 1, min(samples, dataset.samples)).astype(int)
    found = [each for location in dataset.locate(chosen) for _, each in dataset.read_captions(location)]
    captions_NLC = torch.stack(found)
    stored = np.stack([np.frombuffer(quantise(caption), np.uint8) for caption in captions_NLC.numpy()])
    read_NLC = dequantise(torch.from_numpy(stored), length, channels)
    values, errors = captions_NLC.double(), (read_NLC.double() - captions_NLC.double())
    values, errors = values[captions_NLC != 0], errors[captions_NLC != 0]
    relative, largest = errors.square().mean().sqrt() / values.square().mean().sqrt(), errors.abs().max() / values.std()
    smaller = stored.shape[1] / (2 * length * channels)
    print(
        f"{directory}: {len(found)} embeddings of {length} x {channels} by {dataset.encoders['text'].get('id')}: "
        f"relative error {100 * float(relative):.2f} %, largest {float(largest):.3f} standard deviations, "
        f"{100 * smaller:.1f} % of the bytes"
    )


if __name__ == "__main__":
    cli.run(main)
