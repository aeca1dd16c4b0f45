"""A trained model as a diffusers pipeline: the form in which models are published.

    from mdit import MicroDiTPipeline                                         # or diffusers.DiffusionPipeline, with
    pipeline = MicroDiTPipeline.from_pretrained("OWNER/NAME").to("cuda")      # trust_remote_code=True
    pipeline("a red apple on a blue background", seed=0).images[0].save("apple.png")

    model_index.json    components; recipe, encoders and weights' checksum
    pipeline.py         names this class, for DiffusionPipeline
    transformer/        config.json, diffusion_pytorch_model.safetensors: the network, float32
    scheduler/          the recipe's noise: how the sampler walks
    vae/                AutoencoderKL; none for plain pixels
    text_encoder/ tokenizer/    of transformers; an open_clip tower is named in model_index.json instead
    README.md           the model card

`tools/export_diffusers.py` writes such a folder, `tools/convert_checkpoint.py import` makes a snapshot of it again. The
same seed gives the same pictures as `launchers/sample.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from huggingface_hub import snapshot_download
from PIL import Image
from torch import Tensor

from mdit.config import ModelConfig, UserError, parse_recipe, parse_section
from mdit.documents import read_json
from mdit.encoders import build_text_encoder, image_encoder_of, text_encoder_of
from mdit.encoders.image import load_autoencoder
from mdit.encoders.loading import reason
from mdit.encoders.text_transformers import load_packed
from mdit.eval.samples import draw_batches, fused_for_sampling, sampling_options
from mdit.files import write_json, write_text
from mdit.models import MicroDiT

INDEX, CODE = "model_index.json", Path("pipeline.py")
SOURCE = '''"""Lets diffusers.DiffusionPipeline find the pipeline of mdit."""

from mdit import MicroDiTPipeline  # noqa: F401  (pip install mdit)
'''


class MicroDiTTransformer(ModelMixin, ConfigMixin):
    """The plain network; its config is the recipe's [model]."""

    @register_to_config
    def __init__(self, model: dict[str, Any]) -> None:
        super().__init__()
        self.network = MicroDiT(parse_section(ModelConfig, model, "transformer/config.json"))

    @classmethod
    def from_pretrained(cls, path, **options):
        """diffusers' own; raises UserError where the file is missing, or its tensors are not those of this model."""
        options |= {"low_cpu_mem_usage": False, "output_loading_info": True, "use_safetensors": True}
        where = Path(path) / options["subfolder"] if options.get("subfolder") else Path(path)
        try:
            loaded: Any = super().from_pretrained(path, **options)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"{where}: {reason(error)}") from None
        transformer, found = loaded
        if (dtype := options.get("dtype") or options.get("torch_dtype")) is not None:
            transformer = transformer.to(dtype)  # diffusers leaves it in the file's
        for what, names in (("lacks", found["missing_keys"]), ("has, beside the model's,", found["unexpected_keys"])):
            if names:
                raise UserError(f"{where}: {what} {min(names)}, and {len(names) - 1} tensors more")
        return transformer

    def forward(self, *args, **kwargs) -> Tensor:
        return self.network(*args, **kwargs)


class MicroDiTScheduler(SchedulerMixin, ConfigMixin):
    """Heun's method (`mdit.diffusion.sampler`) for the recipe's [noise], which is its config."""

    @register_to_config
    def __init__(self, noise: dict[str, Any]) -> None:
        pass


@dataclass
class MicroDiTPipelineOutput(BaseOutput):
    images: list[Image.Image]


class MicroDiTPipeline(DiffusionPipeline):
    """See the module. `recipe` and `encoders` are those of the snapshot, `weights` is what it says of the file that the
    transformer has."""

    _optional_components = ["vae", "text_encoder", "tokenizer"]

    def __init__(
        self,
        transformer,
        scheduler,
        vae=None,
        text_encoder=None,
        tokenizer=None,
        recipe: dict[str, Any] | None = None,
        encoders: dict[str, Any] | None = None,
        weights: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer, scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer
        )
        self.register_to_config(recipe=recipe, encoders=encoders, weights=weights)
        model, source = transformer.config.model, INDEX
        if recipe is None or encoders is None:
            raise UserError(f"{source}: has no {'encoders' if recipe else 'recipe'}: not a pipeline of mdit")
        self.recipe = parse_recipe(recipe, source)
        if (wanted := self.recipe.model) != parse_section(ModelConfig, model, "transformer/config.json"):
            raise UserError(f"{source}: the recipe's model is not that of transformer/config.json")
        if vae is not None and vae.config.latent_channels != wanted.latent_channels:
            has, takes = vae.config.latent_channels, wanted.latent_channels
            raise UserError(f"vae: has latents of {has} channels, the transformer takes {takes}")
        self._fused: tuple[Any, MicroDiT] | None = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        torch_dtype: torch.dtype = torch.float32,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> "MicroDiTPipeline":
        """A pipeline from a folder or from the Hub, without running any code that comes with it. Raises UserError where
        a part is missing, damaged or not of this model."""
        name, folder = str(pretrained_model_name_or_path), Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            try:
                options = {"revision": revision, "token": token, "ignore_patterns": ["*.py"]}
                folder = Path(snapshot_download(name, **options))
            except (OSError, ValueError) as error:
                raise UserError(f"{name}: no such folder, and not to be had from the Hub: {reason(error)}") from None
        index = read_json(folder / INDEX)
        transformer = MicroDiTTransformer.from_pretrained(folder / "transformer", torch_dtype=torch_dtype)
        scheduler = MicroDiTScheduler.from_pretrained(folder / "scheduler")
        vae = tower = None
        if (folder / "vae").is_dir():
            vae = load_autoencoder(str(folder), f"{name}: vae", torch_dtype).eval().requires_grad_(False)
        if (folder / "text_encoder").is_dir():
            tower = load_packed(folder, f"{name}: text_encoder", torch_dtype)
        facts = {key: index.get(key) for key in ("recipe", "encoders", "weights")}
        words = (tower.model, tower.tokenizer) if tower else (None, None)
        return cls(transformer, scheduler, vae, *words, **facts)

    def save_pretrained(self, save_directory: str | Path, *args, **options) -> None:
        """diffusers' own, and what lets DiffusionPipeline find this class."""
        super().save_pretrained(save_directory, *args, **options)
        index = Path(save_directory, INDEX)
        content = read_json(index) | {"_class_name": [CODE.stem, type(self).__name__]}
        content.pop("_name_or_path", None)
        write_json(index, content)
        write_text(Path(save_directory, CODE), SOURCE)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        seed: int = 0,
        batch_size: int = 16,
    ) -> MicroDiTPipelineOutput:
        """A picture for each prompt, on the pipeline's device. Guidance and steps are the recipe's where they are not
        given. Picture i depends on its prompt, `seed` and i alone."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        options = sampling_options(self.recipe, guidance_scale, num_inference_steps) | {"batch_size": batch_size}
        captions_NLC, images = self._captions(prompts), []
        source, rows = Path(self.recipe.name) / INDEX, range(len(prompts))
        vae = image_encoder_of(self.vae, self._description("image", self.vae))
        for batch in draw_batches(self._network(), vae, captions_NLC, self.recipe, seed, rows, source, **options):
            images += [Image.fromarray(image.numpy()) for image in batch]
        return MicroDiTPipelineOutput(images=images)

    def _captions(self, prompts: list[str]) -> Tensor:
        if self.text_encoder is None:
            return build_text_encoder(self.config["encoders"]["text"], self.device).encode(prompts)
        description = self._description("text", self.text_encoder)
        return text_encoder_of(self.text_encoder, self.tokenizer, description).encode(prompts)

    def _description(self, which: str, model) -> dict[str, Any]:
        """The encoder's description in the format in which it has been loaded, whose bytes are not those described."""
        described = {key: value for key, value in self.config["encoders"][which].items() if key != "weights"}
        if model is not None:
            described["precision"] = str(model.dtype).removeprefix("torch.")
        return described

    def _network(self) -> MicroDiT:
        """The transformer's network in its fused form, which shares its weights, for its device and format."""
        weight = next(self.transformer.parameters())
        key = weight.device, weight.dtype, weight.data_ptr()
        if self._fused is None or self._fused[0] != key:
            with torch.device("meta"):
                model = MicroDiT(self.recipe.model)
            model.load_state_dict(self.transformer.network.state_dict(), assign=True)
            self._fused = key, fused_for_sampling(model.eval().requires_grad_(False))
        return self._fused[1]
