"""Pictures from Python, written to picture_0.png, picture_1.png, ...

python examples/generate.py runs/quickstart/snapshots/latest "a red apple on a blue background" "a frog on pink"
"""

import sys

from mdit import generate, load_snapshot

snapshot, *prompts = sys.argv[1:]
for i, picture in enumerate(generate(load_snapshot(snapshot), prompts, guidance=2.5, steps=18, seed=0)):
    picture.save(f"picture_{i}.png")
