"""A program: FID of two folders by torch-fidelity's own command, and by mdit from pictures and from statistics.

python -m tests.fidelity FOLDER    with FOLDER/one/*.png, FOLDER/other/*.png of 40 px -> three numbers as JSON
"""

import contextlib
import io
import json
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from mdit.config import MetricsConfig
from mdit.dist import World
from mdit.eval.metrics import PictureMetrics
from mdit.eval.picture_sets import open_pictures
from mdit.eval.scores import judged

SIZE = 40
CPU = torch.device("cpu")


def main(folder: Path) -> None:
    # A torchvision for GPUs does not find its operations beside a torch for CPUs, and nothing here needs them.
    operations = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        operations.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    weights = folder / "weights.pth"
    save_random_inception(weights)
    config = MetricsConfig(names=("fid",), every=1, num_pictures=2, inception=str(weights))
    metrics, world = PictureMetrics(config, CPU), World(0, 1, 0, CPU)
    one, other = (
        judged(metrics, ["inception"], open_pictures(str(folder / name), CPU), SIZE, world) for name in ("one", "other")
    )
    features_NF = other["inception"].double().numpy()
    statistics = folder / "statistics.npz"
    np.savez(statistics, mu=features_NF.mean(0), sigma=np.cov(features_NF, rowvar=False))
    ours = [metrics.scores(one, reference)["fid"] for reference in (other, metrics.load(statistics))]
    print(json.dumps([by_command(folder, weights), *ours]))


def save_random_inception(path: Path) -> None:
    """Weights in the file format of the real ones; batch norms keep up what is handed on."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Inception

    torch.manual_seed(0)
    with mock.patch("torch.load"), mock.patch.object(Inception, "load_state_dict"):
        network = Inception("inception-v3-compat", ["2048"], "none")
    state = network.state_dict()
    torch.save({name: 2.45 * t if name.endswith("bn.weight") else t for name, t in state.items()}, path)


def by_command(folder: Path, weights: Path) -> float:
    from torch_fidelity import fidelity

    options = ["--fid", "--cpu", "--json", "--silent", "--save-cpu-ram", "--no-cache"]
    inputs = ["--input1", str(folder / "one"), "--input2", str(folder / "other")]
    command = ["fidelity", *options, "--feature-extractor-weights-path", str(weights), *inputs]
    with mock.patch.object(sys, "argv", command), contextlib.redirect_stdout(io.StringIO()) as told:
        fidelity.main()
    return json.loads(told.getvalue())["frechet_inception_distance"]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
