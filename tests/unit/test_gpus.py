"""The card catalogue."""

from __future__ import annotations

import time
import tomllib

import pytest

from vramplan.errors import UnknownNameError
from vramplan.gpus import find_gpu, load_gpus, plain
from vramplan.resources import profiles_dir

REQUIRED = """rtx-3060-12gb rtx-3060-8gb rtx-3070 rtx-3080-10gb rtx-3090-24gb rtx-4060-ti-16gb
rtx-4070 rtx-4080 rtx-4090-24gb rtx-5090-32gb t4-16gb p100-16gb v100-16gb v100-32gb a10-24gb
a10g-24gb l4-24gb l40s-48gb a6000-48gb rtx-6000-ada-48gb a100-40gb a100-80gb h100-pcie-80gb
h100-sxm-80gb h200-141gb gh200 b200 rtx-3060-laptop-6gb rtx-3070-laptop-8gb rtx-3080-laptop-16gb
rtx-4060-laptop-8gb rtx-4070-laptop-8gb rtx-4080-laptop-12gb rtx-4090-laptop-16gb
rtx-5090-laptop-24gb"""
MIB = 1024**2


def test_required_cards_are_there() -> None:
    assert set(REQUIRED.split()) <= set(load_gpus())
    assert len(load_gpus()) >= 50


def test_every_card_is_plausible_and_sourced() -> None:
    for gpu in load_gpus().values():
        assert gpu.source
        assert gpu.memory_bytes is not None or gpu.memory_note
        if gpu.memory_bytes is not None:
            assert 0.85 < gpu.memory_bytes / (gpu.box_gb * 1024**3) <= 1, gpu.slug
            assert gpu.memory_source
        assert gpu.bandwidth_bytes_per_s is not None and 1e11 < gpu.bandwidth_bytes_per_s < 1e13
        assert gpu.board_power_w is None or 50 <= gpu.board_power_w <= 1000, gpu.slug
        if not gpu.supports_bf16:
            assert gpu.bf16_flops_per_s is None and gpu.tf32_flops_per_s is None


def test_no_name_means_two_cards() -> None:
    owners: dict[str, str] = {}
    for gpu in load_gpus().values():
        for name in {plain(n) for n in (gpu.slug, gpu.name, *gpu.aliases)}:
            assert owners.setdefault(name, gpu.slug) == gpu.slug, name


def test_units_that_the_hardware_has_not_are_null() -> None:
    for gpu in load_gpus().values():
        if gpu.compute_capability < (7, 0) and gpu.compute_capability != (6, 0):
            assert gpu.fp16_flops_per_s is None, gpu.slug
        for rate in (gpu.bf16_flops_per_s, gpu.fp16_flops_per_s, gpu.tf32_flops_per_s):
            assert rate is None or 1e12 < rate < 3e15, gpu.slug
        if gpu.supports_bf16:
            assert gpu.bf16_flops_per_s == gpu.fp16_flops_per_s, gpu.slug


def test_geforce_rates_are_those_with_fp32_accumulation() -> None:
    """The whitepapers of Ampere, Ada and Blackwell agree: twice fp32, half of fp16 accumulation."""
    cards = [g for g in load_gpus().values() if "GeForce" in g.name and g.bf16_flops_per_s]
    assert len(cards) > 30
    for gpu in cards:
        assert gpu.bf16_flops_per_s and gpu.fp32_flops_per_s
        assert gpu.bf16_flops_per_s / gpu.fp32_flops_per_s == pytest.approx(2, rel=0.01), gpu.slug
        assert gpu.tf32_flops_per_s == gpu.fp32_flops_per_s, gpu.slug


# dense rates with fp32 accumulation, from NVIDIA's datasheets and architecture whitepapers
@pytest.mark.parametrize(
    ("slug", "bf16", "fp16", "tf32"),
    [
        ("a100-80gb", 312e12, 312e12, 156e12),
        ("h100-sxm-80gb", 989.4e12, 989.4e12, 494.7e12),
        ("h100-pcie-80gb", 756e12, 756e12, 378e12),
        ("b200", 2250e12, 2250e12, 1125e12),
        ("rtx-5090-32gb", 209.5e12, 209.5e12, 104.8e12),
        ("rtx-4090-24gb", 165.2e12, 165.2e12, 82.6e12),
        ("rtx-3090-24gb", 71e12, 71e12, 35.6e12),
        ("l40s-48gb", 362e12, 362e12, 183e12),
        ("l4-24gb", 121e12, 121e12, 60e12),
        ("a6000-48gb", 154.8e12, 154.8e12, 77.4e12),
        ("t4-16gb", None, 65e12, None),
        ("v100-16gb", None, 125e12, None),
        ("p100-16gb", None, 18.7e12, None),
    ],
)
def test_rates_are_dense(
    slug: str, bf16: float | None, fp16: float | None, tf32: float | None
) -> None:
    gpu = find_gpu(slug)
    rates = (gpu.bf16_flops_per_s, gpu.fp16_flops_per_s, gpu.tf32_flops_per_s)
    assert rates == tuple(None if r is None else pytest.approx(r) for r in (bf16, fp16, tf32))
    assert gpu.supports_bf16 == (bf16 is not None)


# what nvidia-smi prints for the total; H200 to T4: https://github.com/modal-labs/modal-client/pull/2797
# and https://thundergolfer.com/blog/nvidia-gpu-memory-capacity; the others as in gpus.toml
@pytest.mark.parametrize(
    ("product", "slug", "mib"),
    [
        ("NVIDIA H200", "h200-141gb", 143771),
        ("NVIDIA H100 80GB HBM3", "h100-sxm-80gb", 81559),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb", 81920),
        ("NVIDIA A100 80GB PCIe", "a100-pcie-80gb", 81920),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb", 40960),
        ("NVIDIA A10G", "a10g-24gb", 23028),
        ("NVIDIA L40S", "l40s-48gb", 46068),
        ("NVIDIA L4", "l4-24gb", 23034),
        ("Tesla T4", "t4-16gb", 15360),
        ("Tesla P100-PCIE-16GB", "p100-16gb", 16384),
        ("Tesla V100-SXM2-16GB", "v100-16gb", 16384),
        ("Tesla V100-SXM2-32GB", "v100-32gb", 32768),
        ("NVIDIA GeForce RTX 3060", "rtx-3060-12gb", 12288),
        ("NVIDIA GeForce RTX 3060 Laptop GPU", "rtx-3060-laptop-6gb", 6144),
        ("NVIDIA GeForce RTX 3080", "rtx-3080-10gb", 10240),
        ("NVIDIA GeForce RTX 3090", "rtx-3090-24gb", 24576),
        ("NVIDIA GeForce RTX 3090 Ti", "rtx-3090-ti", 24564),
        ("NVIDIA GeForce RTX 4070 Laptop GPU", "rtx-4070-laptop-8gb", 8188),
        ("NVIDIA GeForce RTX 4080", "rtx-4080", 16376),
        ("NVIDIA GeForce RTX 4090", "rtx-4090-24gb", 24564),
        ("NVIDIA GeForce RTX 5090", "rtx-5090-32gb", 32607),
        ("NVIDIA RTX A6000", "a6000-48gb", 49140),
        ("NVIDIA RTX 6000 Ada Generation", "rtx-6000-ada-48gb", 49140),
        ("NVIDIA GH200 480GB", "gh200", 97871),
        ("NVIDIA B200", "b200", 183359),
    ],
)
def test_nvidia_smi_names_and_totals(product: str, slug: str, mib: int) -> None:
    gpu = find_gpu(product)
    assert (gpu.slug, gpu.memory_bytes) == (slug, mib * MIB)


def test_unknown_memory_is_null() -> None:
    gpu = find_gpu("NVIDIA GB10")
    assert gpu.memory_bytes is None
    assert gpu.memory_note


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("3060", "rtx-3060-12gb"),
        ("RTX 3060 12GB", "rtx-3060-12gb"),
        ("rtx3060", "rtx-3060-12gb"),
        ("3060 8gb", "rtx-3060-8gb"),
        ("GeForce RTX 3060 Ti", "rtx-3060-ti-8gb"),
        ("3060ti", "rtx-3060-ti-8gb"),
        ("3080", "rtx-3080-10gb"),
        ("3080 12GB", "rtx-3080-12gb"),
        ("3080 laptop", "rtx-3080-laptop-16gb"),
        ("4060 ti", "rtx-4060-ti-8gb"),
        ("4060 Ti 16GB", "rtx-4060-ti-16gb"),
        ("4070 Ti SUPER", "rtx-4070-ti-super"),
        ("rtx_4090", "rtx-4090-24gb"),
        ("RTX4090", "rtx-4090-24gb"),
        ("4090 laptop", "rtx-4090-laptop-16gb"),
        ("1080ti", "gtx-1080-ti"),
        ("TITAN RTX", "titan-rtx"),
        ("T4", "t4-16gb"),
        ("P100", "p100-16gb"),
        ("v100", "v100-16gb"),
        ("V100 32GB", "v100-32gb"),
        ("a10", "a10-24gb"),
        ("A10G", "a10g-24gb"),
        ("a100", "a100-80gb"),
        ("A100 40GB", "a100-40gb"),
        ("A100 PCIe 40GB", "a100-40gb"),
        ("a6000", "a6000-48gb"),
        ("RTX 6000 Ada", "rtx-6000-ada-48gb"),
        ("L40S", "l40s-48gb"),
        ("H100", "h100-sxm-80gb"),
        ("H100 PCIe", "h100-pcie-80gb"),
        ("H200", "h200-141gb"),
        ("GH200", "gh200"),
    ],
)
def test_names_people_use(name: str, slug: str) -> None:
    assert find_gpu(name).slug == slug


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("rtx-3061-12gb", "rtx-3060-12gb"), ("h100-sxm-81gb", "h100-sxm-80gb"), ("a101", "a100")],
)
def test_unknown_card_names_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(UnknownNameError, match="did you mean") as caught:
        find_gpu(name)
    assert nearest in caught.value.suggestions


@pytest.mark.parametrize("name", ["", "nvidia", "rtx", "6000"])
def test_words_that_name_no_card(name: str) -> None:
    with pytest.raises(UnknownNameError):
        find_gpu(name)


def test_the_file_is_quick_to_read() -> None:
    text = (profiles_dir() / "gpus.toml").read_text()
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        tomllib.loads(text)
        best = min(best, time.perf_counter() - start)
    assert best < 0.03  # 6 ms where this was written; room for slow machines
