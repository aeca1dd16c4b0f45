"""A page in the browser that draws pictures for prompts: guidance, steps, seed, a grid, and a history.

    python launchers/demo.py --snapshot runs/quickstart/snapshots/latest      # then open http://127.0.0.1:7860

On this process's GPU where there is one. Whoever can reach HOST:PORT can draw; requests wait for each other. Pictures
are PNG files that carry prompt, settings and the weights' checksum. Needs gradio: pip install 'mdit[demo]'.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mdit import cli
from mdit.config import UserError

MOST_PICTURES, MOST_STEPS, MOST_GUIDANCE, MOST_LETTERS = 16, 100, 15, 2000
MOST_SEED = 2**53  # that a page's numbers hold
SHOWN_LETTERS = 60  # of a prompt below its picture
KEPT = 64  # pictures of a page's history


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    parser.add_argument("--snapshot", type=Path, required=True, help="a run's snapshots/latest, or one step of it")
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema")
    parser.add_argument(
        "--host", default="127.0.0.1", help="default: this machine alone; 0.0.0.0: whoever can reach it"
    )
    parser.add_argument("--port", type=cli.whole(1, 65535), default=7860)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    try:
        import gradio
    except ImportError as error:
        raise UserError(f"needs gradio ({error}): pip install 'mdit[demo]'") from None
    from mdit.checkpoint.snapshot import load_snapshot
    from mdit.eval.samples import Painter

    painter = Painter(load_snapshot(args.snapshot), args.weights)
    with tempfile.TemporaryDirectory(prefix="mdit_demo_") as folder:
        page = build_page(gradio, painter, Path(folder))
        where = {"server_name": args.host, "server_port": args.port, "allowed_paths": [folder]}
        try:
            page.queue(default_concurrency_limit=1).launch(quiet=True, prevent_thread_lock=True, **where)
        except OSError as error:
            raise UserError(f"--port {args.port}: {error}") from None
        print(f"http://{args.host}:{args.port} draws; Ctrl-C ends it", flush=True)
        page.block_thread()


def build_page(gradio: Any, painter: Any, folder: Path) -> Any:
    """The page; its pictures lie in `folder`."""
    snapshot = painter.snapshot
    report, name = snapshot.config.report, snapshot.config.name

    def draw(prompt: str, count: float, guidance: float, steps: float, seed: float, history: list) -> Iterator[tuple]:
        """Show all pictures so far, again after every one."""
        shown: list[tuple[str, str]] = []
        try:
            prompt, count, settings = checked(prompt, count, guidance, steps, seed)
            for number, picture in enumerate(painter.draw([prompt] * count, batch_size=1, **settings)):
                about = painter.about(prompt, number=number, **settings)
                shown.append((keep(picture, about), caption(prompt, settings)))
                yield shown, history, history
        except UserError as error:
            gradio.Warning(str(error))
            yield gradio.skip(), gradio.skip(), history
            return
        history = [*reversed(shown), *history][:KEPT]
        yield shown, history, history

    def keep(picture: Any, about: dict[str, str]) -> str:
        from mdit.eval.samples import save_png

        with tempfile.NamedTemporaryFile(dir=folder, suffix=".png", delete=False) as file:
            save_png(picture, Path(file.name), about)
        return file.name

    with gradio.Blocks(title=f"mdit: {name}", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gradio.Markdown(f"# {name}\nA MicroDiT after {snapshot.step:,} steps, drawn by mdit.")
        with gradio.Row():
            with gradio.Column(scale=1):
                first = report.prompts[0] if report.prompts != "validation" else ""
                prompt = gradio.Textbox(first, label="Prompt", lines=3, max_lines=8, autofocus=True)
                count = gradio.Slider(1, MOST_PICTURES, 4, step=1, label="Pictures")
                guidance = gradio.Slider(1, MOST_GUIDANCE, report.guidance, step=0.5, label="Guidance (1 is none)")
                steps = gradio.Slider(2, MOST_STEPS, report.sampler_steps, step=1, label="Steps")
                seed = gradio.Number(0, label="Seed", precision=0)
                button = gradio.Button("Draw", variant="primary")
            with gradio.Column(scale=2):
                grid = gradio.Gallery(label="Pictures", columns=4, format="png", object_fit="contain")
                history = gradio.Gallery(label="History", columns=8, format="png", object_fit="contain")
        kept = gradio.State([])
        inputs = [prompt, count, guidance, steps, seed, kept]
        for event in (button.click, prompt.submit):
            event(draw, inputs, [grid, history, kept], api_name="draw" if event == button.click else False)
    return page


def checked(
    prompt: str | None, count: float | None, guidance: float | None, steps: float | None, seed: float | None
) -> tuple[str, int, dict[str, Any]]:
    """-> prompt, number of pictures, settings of `Painter.draw`. Raises UserError: a request need not be the page's."""
    prompt = (prompt or "").strip()
    if not prompt:
        raise UserError("the prompt is empty")
    if len(prompt) > MOST_LETTERS:
        raise UserError(f"the prompt has {len(prompt):,} characters; {MOST_LETTERS:,} are the most")
    limits = {"pictures": (count, 1, MOST_PICTURES), "steps": (steps, 2, MOST_STEPS), "seed": (seed, 0, MOST_SEED)}
    whole = {}
    for what, (value, least, most) in limits.items():
        if value is None or not least <= value <= most or value != int(value):
            raise UserError(f"{what} is {value}; expected a whole number from {least:,} to {most:,}")
        whole[what] = int(value)
    if guidance is None or not 0 < guidance <= MOST_GUIDANCE:
        raise UserError(f"guidance is {guidance}; expected a number above 0, {MOST_GUIDANCE} at most")
    return prompt, whole["pictures"], {"guidance": float(guidance), "steps": whole["steps"], "seed": whole["seed"]}


def caption(prompt: str, settings: dict[str, Any]) -> str:
    shown = prompt if len(prompt) <= SHOWN_LETTERS else f"{prompt[:SHOWN_LETTERS]}…"
    return f"{shown} (seed {settings['seed']}, guidance {settings['guidance']:g}, {settings['steps']} steps)"


if __name__ == "__main__":
    cli.run(main)
