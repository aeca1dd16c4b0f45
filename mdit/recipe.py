"""The recipe: what is learned, as frozen pydantic models. `mdit.config` reads it from one TOML file.

A recipe never says how the run is laid out on machines: ZeRO stage, precision and micro-batch live in the DeepSpeed
JSON (`mdit.parallel.settings`). Bounds are of what can be counted in 64 bits or built at all: whether a model fits into
memory is not known here.
"""

from typing import Annotated, Literal

from pydantic import Field, Tag, model_validator

from mdit.captions import CaptionWeights
from mdit.documents import UserError
from mdit.mask_schedule import LinearMask, MaskSchedule
from mdit.sections import (
    Count,
    Decay,
    Embeddings,
    Length,
    Location,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Probability,
    Ratio,
    Section,
    Seed,
    Share,
    Size,
    tagged,
)

# Model keys that change no weight but the position embedding, which is rebuilt when one of the first two differs.
POSITION_KEYS = ("latent_size", "pos_interp_scale")
FREE_KEYS = POSITION_KEYS + ("capacity_factor", "caption_length")


class ModelConfig(Section, frozen=True):  # pyright: ignore[reportGeneralTypeIssues]  (so is Section, by model_config)
    """Shape of MicroDiT (paper section 2 and appendix; names of the released code where they are plain).

    `qkv_ratio` and `ffn_ratio` are the multipliers of `dim` at the first and the last block; between them the widths
    grow linearly with depth. Block i (from 0) has experts when (i + 1) is a multiple of `experts_every_n`, except the
    last block; the mixer's blocks likewise, its last one included. `experts_every_n` 0 gives a dense model.

    `rotary` is a lever beyond the paper: q and k of every self-attention are turned by their patches' row and column
    (axial RoPE), beside the table of positions that is added to the patches.
    """

    latent_size: Size
    latent_channels: Annotated[int, Field(gt=0, le=2**10)]
    patch_size: Size
    dim: Size
    depth: Annotated[Count, Field(gt=0)]
    head_dim: Size
    multiple_of: Size
    caption_length: Size
    caption_channels: Size
    pos_interp_scale: Annotated[float, Field(ge=2**-10, le=2**10)]
    norm_eps: PositiveFloat
    use_bias: bool
    qkv_ratio: tuple[Ratio, Ratio]
    ffn_ratio: tuple[Ratio, Ratio]
    use_patch_mixer: bool
    mixer_depth: Count
    mixer_dim: Size
    mixer_qkv_ratio: Ratio
    mixer_ffn_ratio: Ratio
    num_experts: Annotated[Count, Field(gt=0)]
    capacity_factor: PositiveFloat
    experts_every_n: NonNegativeInt
    rotary: bool = False

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W)"""
        return self.latent_channels, self.latent_size, self.latent_size

    @property
    def caption_shape(self) -> tuple[int, int]:
        """(L, C)"""
        return self.caption_length, self.caption_channels

    @property
    def num_patches(self) -> int:
        return (self.latent_size // self.patch_size) ** 2

    @model_validator(mode="after")
    def _shapes_fit(self):
        _require_multiple("latent_size", self.latent_size, "patch_size", self.patch_size)
        _require_multiple("dim", self.dim, "head_dim", self.head_dim)
        _require_multiple("dim", self.dim, "4 (sine and cosine of two axes)", 4)
        _require_width("dim", self.dim, "qkv_ratio", min(self.qkv_ratio))
        _require_width("dim", self.dim, "ffn_ratio", min(self.ffn_ratio))
        if self.use_patch_mixer:
            _require_multiple("mixer_dim", self.mixer_dim, "head_dim", self.head_dim)
            _require_width("mixer_dim", self.mixer_dim, "mixer_qkv_ratio", self.mixer_qkv_ratio)
            _require_width("mixer_dim", self.mixer_dim, "mixer_ffn_ratio", self.mixer_ffn_ratio)
        if self.capacity_factor > self.num_experts:
            raise ValueError(f"capacity_factor {self.capacity_factor} is above num_experts {self.num_experts}")
        if self.rotary:
            _require_multiple("head_dim", self.head_dim, "4 (rotary: pairs for two axes)", 4)
        return self


class EDMNoise(Section):
    """EDM (Karras et al. 2022, table 1): ln sigma ~ N(P_mean, P_std^2). `sigma_data`: standard deviation of latents."""

    target: Literal["edm"] = "edm"
    P_mean: float
    P_std: PositiveFloat
    sigma_data: PositiveFloat


class FlowNoise(Section):
    """Rectified flow (Liu et al. 2023): velocities on straight lines from latents, at t = 0, to noise, at t = 1.

    ln(t / (1 - t)) ~ N(mean, std^2), or t uniform in [0, 1); then t' = shift t / (1 + (shift - 1) t), in sampling too.
    """

    target: Literal["flow"]
    times: Literal["logit_normal", "uniform"] = "logit_normal"
    mean: Annotated[float, Field(ge=-64, le=64)] = 0.0
    std: Annotated[float, Field(gt=0, le=64)] = 1.0
    shift: Annotated[float, Field(ge=2**-10, le=2**10)] = 1.0
    sigma_data: PositiveFloat

    @model_validator(mode="after")
    def _uniform_has_no_mean(self):
        if self.times == "uniform" and (self.mean, self.std) != (0, 1):
            raise ValueError(f'mean is {self.mean} and std {self.std} but times is "uniform"; leave them out')
        return self


NoiseConfig = Annotated[
    Annotated[EDMNoise, Tag("edm")] | Annotated[FlowNoise, Tag("flow")], tagged("target", "edm", '"edm" or "flow"')
]


class EmojiSource(Section):
    """Captioned scenes of one emoji on a plain background, drawn from pip packages (`mdit.sources.emoji`)."""

    name: Literal["emoji"]
    objects: PositiveInt | tuple[str, ...] = Field(description="how many objects, or their CLDR names")
    styles: tuple[Literal["twemoji", "openmoji"], ...] = Field(min_length=1)
    scenes: PositiveInt = Field(description="training pictures")
    validation_scenes: PositiveInt = Field(description="pictures of held-out object x background pairs")
    held_out: Annotated[float, Field(gt=0, lt=1)] = Field(description="share of the pairs that training never sees")
    seed: Seed


class FolderSource(Section):
    """A directory of pictures with a `captions.jsonl` beside them (`mdit.sources.folder`)."""

    name: Literal["folder"]
    path: Location
    validation_share: Annotated[float, Field(gt=0, lt=1)]


class PrecomputeConfig(Section):
    """Settings by which the training set is made when it is not there yet: source, frozen encoders, caption tokens."""

    source: EmojiSource | FolderSource = Field(discriminator="name")
    image_size: Size
    image_encoder: str
    text_encoder: str
    embeddings: Embeddings = Field("f16", description="how caption embeddings are stored: docs/data.md")
    captions: CaptionWeights | None = Field(None, description="weights of the kinds of captions: docs/data.md")


class DataConfig(Section):
    """Directories of latent shards (`mdit-latents`). Several training directories are read as one set, in proportion
    to their sizes; with `weights`, one for each, every batch holds them in that proportion. `captions` are weights of
    the kinds of captions in place of the sets' own."""

    train: Annotated[tuple[Location, ...], Field(min_length=1)]
    weights: tuple[PositiveFloat, ...] | None = None
    captions: CaptionWeights | None = None
    validation: Location
    caption_drop: Probability
    precompute: PrecomputeConfig | None = None

    @model_validator(mode="after")
    def _directories_fit(self):
        if self.weights is not None and len(self.weights) != len(self.train):
            raise ValueError(f"weights has {len(self.weights)} values, but train has {len(self.train)} directories")
        if self.precompute is not None and self.validation == self.train[0]:
            raise ValueError(f"train and validation are both {self.validation!r}; give each set made a directory")
        return self


class TrainingConfig(Section):
    """A step whose gradient is not finite is skipped; the run ends when that happens `max_skipped_in_a_row` times."""

    num_steps: PositiveInt
    global_batch_size: PositiveInt
    mask_ratio: MaskSchedule
    max_skipped_in_a_row: PositiveInt = 10

    @property
    def mask_ratios(self) -> tuple[float, ...]:
        """Every mask ratio that a step may have."""
        ratio = self.mask_ratio
        return ratio.ratios if isinstance(ratio, LinearMask) else (ratio,)

    @property
    def fixed_mask_ratio(self) -> float:
        """The mask ratio of all steps. Raises UserError where it is not one."""
        if isinstance(self.mask_ratio, LinearMask):
            several = ", ".join(f"{ratio:g}" for ratio in self.mask_ratios)
            raise UserError(
                f"training.mask_ratio is a schedule of {several}; expected a number here, as in "
                f"--set training.mask_ratio={self.mask_ratios[0]:g}"
            )
        return self.mask_ratio


class AlignConfig(Section, frozen=True):  # pyright: ignore[reportGeneralTypeIssues]  (as ModelConfig)
    """Representation alignment (REPA, arXiv 2410.06940) until `stop_step`: `weight` times the mean over kept patches of
    1 - cos(p, f), p a projection, `width` wide, of the output of block `block` (from 1), f a `tower`'s feature."""

    tower: Location  # efficientnet-lite0, or path or hub id of a DINOv2 or DINOv3
    channels: Size  # of the tower
    block: Annotated[Count, Field(gt=0)]
    weight: PositiveFloat
    stop_step: PositiveInt
    width: Size


class MuonConfig(Section):
    """Muon's own keys (`mdit.train.muon`); schedule and clipping are those of [optim], `lr` is its peak."""

    lr: PositiveFloat
    weight_decay: Annotated[float, Field(ge=0)]
    momentum: Decay = 0.95
    eps: PositiveFloat = 1e-7
    newton_schulz_steps: Annotated[int, Field(gt=0, le=100)] = 5


class OptimConfig(Section):
    """AdamW, or with `name` "muon" Muon for the blocks' matrices and AdamW, by the keys here, for all else.

    The schedule: linear warm-up, then constant, or cosine down to `final_lr_ratio` times the peak, or "wsd": constant
    until the last `decay_share` of the run's steps, in which it falls to that, linearly or as 1 - sqrt. Every
    `implementation` of AdamW takes the same step; a run may go on with another (`mdit.train.optim`).
    """

    name: Literal["adamw", "muon"] = "adamw"
    muon: MuonConfig | None = None
    lr: PositiveFloat
    betas: tuple[Decay, Decay]
    eps: PositiveFloat
    weight_decay: Annotated[float, Field(ge=0)]
    max_grad_norm: PositiveFloat
    warmup_steps: NonNegativeInt
    schedule: Literal["constant", "cosine", "wsd"]
    final_lr_ratio: Share
    decay_share: Share | None = None
    decay_shape: Literal["linear", "1-sqrt"] | None = None
    implementation: Literal["torch", "deepspeed", "apex"] = "torch"

    @model_validator(mode="after")
    def _muon_has_its_keys(self):
        if (self.name == "muon") != (self.muon is not None):
            raise ValueError(f'name is "{self.name}" {"with" if self.muon else "without"} a table [optim.muon]')
        if self.muon is not None and self.implementation != "torch":
            raise ValueError(f'implementation is "{self.implementation}" but name is "muon"; expected "torch"')
        return self

    @model_validator(mode="after")
    def _constant_has_no_floor(self):
        if self.schedule == "constant" and self.final_lr_ratio != 1:
            raise ValueError(f'final_lr_ratio is {self.final_lr_ratio} but schedule is "constant"; set it to 1.0')
        return self

    @model_validator(mode="after")
    def _a_decay_belongs_to_wsd(self):
        for key in ("decay_share", "decay_shape"):
            value = getattr(self, key)
            if self.schedule == "wsd" and value is None:
                raise ValueError(f'schedule "wsd" needs {key}')
            if self.schedule != "wsd" and value is not None:
                raise ValueError(f'{key} is {value!r} but schedule is "{self.schedule}"; it belongs to "wsd"')
        return self


class EMAConfig(Section):
    """ema <- decay * ema + (1 - decay) * weights after each step beyond `start_step`; until then ema is the weights."""

    decay: Annotated[float, Field(gt=0, lt=1)]
    start_step: NonNegativeInt


class AveragesConfig(Section):
    """Two averages of the weights from which that of any length is made after training (arXiv 2312.02696, section 3).

    A length is sigma_rel, the profile's standard deviation as a share of the run so far: ema <- beta ema + (1 - beta)
    weights after step t, beta = (1 - 1 / t)^(gamma + 1). Both are stored every `every` steps and at the end.
    """

    lengths: tuple[Length, Length] = (0.05, 0.10)
    every: PositiveInt

    @model_validator(mode="after")
    def _lengths_differ(self):
        if self.lengths[0] >= self.lengths[1]:
            raise ValueError(f"lengths is {list(self.lengths)}; expected a shorter one and a longer one")
        return self


class ReportConfig(Section):
    """Intervals of the run's reports, in steps. 0 turns a report off (a finished run always leaves a snapshot)."""

    log_every: PositiveInt
    validate_every: NonNegativeInt
    sample_every: NonNegativeInt
    snapshot_every: NonNegativeInt
    checkpoint_every: PositiveInt
    keep_checkpoints: PositiveInt
    prompts: Literal["validation"] | Annotated[tuple[str, ...], Field(min_length=1)]  # captions of the sample grids
    num_samples: Size = Field(description="pictures in a grid when the prompts are those of the validation set")
    guidance: PositiveFloat
    sampler_steps: Annotated[int, Field(ge=2, le=10_000)]


MetricName = Literal["fid", "fd_dinov2", "fd_efflite0", "cmmd", "clip_score"]


class MetricsConfig(Section):
    """Scores (`mdit.eval.metrics`) every `every` steps and at the end, of pictures for `num_pictures` captions of the
    validation set, against a `reference` (docs/evaluation.md) or that set's pictures. Towers by path or hub id."""

    names: Annotated[tuple[MetricName, ...], Field(min_length=1)]
    every: PositiveInt
    num_pictures: Annotated[int, Field(ge=2, le=10**6)]
    reference: Location | None = None
    inception: Location = "download"  # by torch-fidelity
    dinov2: Location = "facebook/dinov2-large"
    cmmd_clip: Location = "openai/clip-vit-large-patch14-336"
    clip: Location = "openai/clip-vit-large-patch14"


class TrainConfig(Section):
    """A whole recipe."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$", max_length=100)]  # of its run directory
    seed: Seed
    model: ModelConfig
    noise: NoiseConfig
    data: DataConfig
    training: TrainingConfig
    optim: OptimConfig
    ema: EMAConfig | None = None
    averages: AveragesConfig | None = None
    align: AlignConfig | None = None
    metrics: MetricsConfig | None = None
    report: ReportConfig

    @property
    def num_averages(self) -> int:
        """Averages of the weights that training keeps."""
        return (self.ema is not None) + (len(self.averages.lengths) if self.averages else 0)

    @model_validator(mode="after")
    def _parts_fit_together(self):
        model, ratio = self.model, max(self.training.mask_ratios)
        if (kept := kept_tokens(model.num_patches, ratio)) == 0:
            raise ValueError(f"training.mask_ratio {ratio} keeps none of {model.num_patches} patches")
        if model.experts_every_n and int(model.capacity_factor * kept / model.num_experts) == 0:
            raise ValueError(
                f"model.capacity_factor {model.capacity_factor} gives {model.num_experts} experts no token of the "
                f"{kept} that training.mask_ratio {ratio} keeps"
            )
        if self.align is not None and self.align.block > model.depth:
            raise ValueError(f"align.block {self.align.block} is above model.depth {model.depth}")
        return self


def free_differences(old: ModelConfig, new: ModelConfig) -> list[str]:
    """The keys in which two models differ that can have the same weights. Raises UserError naming all others, with both
    values."""
    before, now = old.model_dump(), new.model_dump()
    differing = [key for key in now if before[key] != now[key]]
    if fixed := [key for key in differing if key not in FREE_KEYS]:
        raise UserError("; ".join(f"model.{key} is {before[key]}, the new recipe's is {now[key]}" for key in fixed))
    return differing


def kept_tokens(num_patches: int, mask_ratio: float) -> int:
    """Patches the backbone sees, rounded down as in the released code."""
    return int(num_patches * (1 - mask_ratio))


def _require_multiple(name: str, value: int, of_name: str, of: int) -> None:
    if value % of:
        raise ValueError(f"{name} {value} is not a multiple of {of_name} {of}")


def _require_width(name: str, value: int, ratio_name: str, ratio: float) -> None:
    if value * ratio < 2:
        raise ValueError(f"{name} {value} times {ratio_name} {ratio} is no width")
