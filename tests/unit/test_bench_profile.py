"""Where a step goes: categories by name, what adds up to what, a trace that other programs open; work by formula."""

import gzip
import json
import re
from pathlib import Path

import pytest
import torch

from mdit.bench.profile import TRACE, category, profile_step, summary
from mdit.bench.roofline import CATEGORY_OF_OP, category_work
from mdit.bench.row import HostTime, Setting
from mdit.config import load_config
from mdit.costs.trace import training_flops
from mdit.diffusion.edm import edm_loss, sample_noise
from mdit.models import MicroDiT
from mdit.parallel.fuse import fuse
from tests.bench_rows import row
from tests.recipes import tiny_config

ROOT = Path(__file__).resolve().parents[2]
PRETRAIN = load_config(ROOT / "configs/res_256_pretrain.toml")
SETTING = Setting(
    gpus=1, micro_batch=256, global_batch=2048, precision="bf16", kernels=tuple(CATEGORY_OF_OP), zero_stage=2
)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopB_TNT", "matmuls"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128_32x3_nn_align8>", "matmuls"),
        ("triton_tem_fused_bmm_3", "matmuls"),
        ("aten::addmm", "matmuls"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, cutlass::bfloat16_t>>", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64", "attention"),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16>", "norm and modulation"),
        ("aten::native_layer_norm_backward", "norm and modulation"),
        ("void at::native::sbtopk::gatherTopK<float, unsigned int, 2, false>", "experts"),
        ("void at::native::indexSelectLargeIndex<c10::BFloat16, long>", "experts"),
        (
            "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4>>",
            "optimizer",
        ),
        ("aten::_fused_adamw_", "optimizer"),
        ("triton_poi_fused_adam_mul_0", "compiled elementwise"),
        ("triton_red_fused_native_layer_norm_2", "compiled elementwise"),
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "communication"),
        ("gloo:all_reduce", "communication"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy<OpaqueType<2u>, unsigned int, 3>", "copies"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>", "copies"),
        ("void at::native::elementwise_kernel<128, 4, direct_copy_kernel_cuda(TensorIteratorBase&)>", "copies"),
        ("void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add<c10::BFloat16>>", "elementwise"),
        ("void (anonymous namespace)::elementwise_kernel_with_index<int, arange_cuda_out>", "elementwise"),
        ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>", "elementwise"),
        ("aten::mul", "elementwise"),
        ("aten::view", "other"),
        ("autograd::engine::evaluate_function: NativeLayerNormBackward0", "other"),
        ("something_new", "other"),
    ],
)
def test_kernels_are_known_by_their_names(name, expected):
    assert category(name) == expected


def test_every_kernel_of_ours_is_known():
    launched = {}
    for folder in {path.parent for path in (ROOT / "kernels").glob("*/triton_impl.py")}:
        text = "".join(path.read_text(encoding="utf-8") for path in folder.glob("triton*.py"))
        text = re.sub(r'^from .* import (\([^)]*\)|.*)$|"{3}[^"]*"{3}', "", text, flags=re.M)
        jitted = re.findall(r"@triton\.jit\ndef (\w+)", text)
        handed_over = [name for name in jitted if re.search(rf"(?<!def )\b{name}\b(?!\()", text)]  # not only called
        launched |= dict.fromkeys(handed_over, folder.name)
    assert {"_attend_held", "_statistics", "_mix_backward", "_swiglu", "_route", "_scatter"} <= launched.keys()
    expected = CATEGORY_OF_OP | {"fp8_linear": "float8"}
    assert {name: category(name) for name in launched} == {name: expected[op] for name, op in launched.items()}


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    config, folder, calls = tiny_config(), tmp_path_factory.mktemp("profile") / "new", []
    model, cpu = fuse(MicroDiT(config.model)), torch.device("cpu")
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    latents, captions = torch.randn(8, *config.model.latent_shape), torch.randn(8, *config.model.caption_shape)

    def step():
        calls.append(None)
        optimizer.zero_grad()
        noise = sample_noise(config, 0, slice(0, 8), cpu)
        edm_loss(model, latents, captions, noise, config.noise).backward()
        optimizer.step()

    step()
    return profile_step(step, device=cpu, directory=folder), folder, len(calls)


def test_a_step_is_all_of_its_categories_and_what_is_between(profiled):
    found, _, calls = profiled
    assert calls == 1 + 1 + 1  # the caller's warm-up, the profiler's, and the one that counts
    assert {"matmuls", "attention", "optimizer", "experts", "norm and modulation"} <= found.categories.keys()
    assert list(found.categories.values()) == sorted(found.categories.values(), reverse=True)
    assert sum(found.categories.values()) + found.idle_ms == pytest.approx(found.step_ms)
    assert 0 < found.idle_ms < found.step_ms and found.host is None


def test_the_trace_is_what_perfetto_and_tensorboard_read(profiled):
    found, folder, _ = profiled
    assert found.trace == TRACE and TRACE.endswith(".pt.trace.json.gz") and [folder / TRACE] == [*folder.iterdir()]
    events = json.loads(gzip.decompress((folder / TRACE).read_bytes()))["traceEvents"]
    assert {"aten::addmm", "ProfilerStep#1"} <= {event["name"] for event in events}
    times = [event["dur"] for event in events if event["name"] == "aten::mm"]
    (kernel,) = [kernel for kernel in found.kernels if kernel.name == "aten::mm"]
    assert len(times) == kernel.calls and sum(times) / 1e3 == pytest.approx(kernel.ms, rel=0.05)


def test_a_screen_says_where_it_goes(profiled):
    found, _, _ = profiled
    lines = summary(row(kind="profile", profile=found)).splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 120 and "256 px, mask 0.75" in lines[0]
    (line,) = [line for line in lines if line.startswith("matmuls")]
    assert f"{found.categories['matmuls']:.2f} ms" in line
    assert f"{found.categories['matmuls'] / found.step_ms:.1%}" in line
    host = HostTime(busy_ms=90.0, launches=3210.0, waiting_ms=4.0)
    printed = summary(row(kind="profile", profile=found.model_copy(update={"host": host})))
    assert "3,210 launches; 90.0 ms in operators and launches" in printed
    assert summary(row(kind="profile", problem="out of memory")) == "256 px, mask 0.75: out of memory"


# --- work by formula


def work(**changes):
    return category_work(PRETRAIN, SETTING.model_copy(update=changes))


def test_work_of_a_step_of_xl_2():
    found = work()
    model_flops = found["matmuls"].flops + found["attention"].flops
    assert model_flops == 2048 * training_flops(PRETRAIN.model, 0.75)
    assert found["experts"].flops / found["experts"].bytes == 1 / 2  # one for each number of bfloat16
    assert found["optimizer"].bytes == pytest.approx(28 * 1.1654e9, rel=1e-3)


def test_work_goes_where_its_time_goes():
    plain = work()
    compiled = work(kernels=("swiglu",), compile=True)
    fused = ("norm and modulation", "experts")
    assert compiled["compiled elementwise"].bytes == sum(plain[name].bytes for name in fused)
    assert compiled["SwiGLU"] == plain["SwiGLU"] and not set(fused) & compiled.keys()
    eager = work(kernels=())
    assert eager.keys() == {"matmuls", "attention", "optimizer"}
    again = work(activation_checkpointing="block")
    assert again["matmuls"].flops == plain["matmuls"].flops * 4 / 3
    two = work(gpus=2)
    assert two["matmuls"].flops == plain["matmuls"].flops / 2
    assert work(precision="fp32")["attention"].bytes == pytest.approx(2 * plain["attention"].bytes)
