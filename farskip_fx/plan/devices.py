"""Devices and links: public figures, and the part of them that models reach.

Contract: a name, or a rate as text, in; numbers out. ``VERSION`` changes with every figure, and stands in each plan.

Terms
    peak    what the maker says, for dense bfloat16
    share   of the peak that whole models reach, the same for all devices: from the presets of ``passes/costs.py``, which
            are H100 figures (500 of 989 Tflop/s in matrix products, 350 in attention, 2.5 of 3.35 TB/s). Another device may
            reach another share: ``farskip calibrate`` measures it.
    link    bytes a second that one device sends, one direction, all of its ports together
"""
from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import ConfigError
from ..passes.costs import Rates

VERSION = 1
MATMUL_SHARE, ATTENTION_SHARE, MEMORY_SHARE = 0.5, 0.35, 0.75
KERNEL_OVERHEAD = 3e-6


@dataclass(frozen=True)
class Device:
    flops: float            # peak
    memory_bytes: float     # a second, peak
    capacity: float         # bytes
    inside: str             # the link between the devices of a node
    source: str


@dataclass(frozen=True)
class Link:
    peak: float
    share: float
    latency: float          # of an exchange without payload
    source: str

    @property
    def rate(self) -> float:
        return self.peak * self.share


DEVICES = {
    "a100": Device(312e12, 2.039e12, 80e9, "nvlink3", "NVIDIA A100 datasheet, SXM 80 GB"),
    "h100": Device(989e12, 3.35e12, 80e9, "nvlink4", "NVIDIA H100 datasheet, SXM"),
    "h200": Device(989e12, 4.8e12, 141e9, "nvlink4", "NVIDIA H200 datasheet"),
    "b200": Device(2250e12, 8.0e12, 180e9, "nvlink5", "NVIDIA HGX B200 datasheet, an eighth of 8 GPUs, dense"),
    "mi300x": Device(1307e12, 5.3e12, 192e9, "infinity-fabric", "AMD Instinct MI300X datasheet"),
    "mi325x": Device(1307e12, 6.0e12, 256e9, "infinity-fabric", "AMD Instinct MI325X datasheet"),
}
LINKS = {
    "nvlink3": Link(300e9, 0.67, 15e-6, "600 GB/s both directions, A100 datasheet"),
    "nvlink4": Link(450e9, 0.67, 15e-6, "900 GB/s both directions, H100 datasheet"),
    "nvlink5": Link(900e9, 0.67, 15e-6, "1.8 TB/s both directions, HGX B200 datasheet"),
    "infinity-fabric": Link(448e9, 0.67, 15e-6, "7 links of 64 GB/s a direction, MI300X platform datasheet"),
    "infiniband-800g": Link(100e9, 0.8, 30e-6, "800 Gbit/s a device, NVIDIA Quantum-X800"),
    "infiniband-400g": Link(50e9, 0.8, 30e-6, "400 Gbit/s a device, NVIDIA Quantum-2 NDR"),
    "infiniband-200g": Link(25e9, 0.8, 30e-6, "200 Gbit/s a device, HDR"),
    "roce-400g": Link(50e9, 0.7, 40e-6, "400 Gbit/s a device, Ethernet"),
    "roce-200g": Link(25e9, 0.7, 40e-6, "200 Gbit/s a device, Ethernet"),
}
_UNITS = {"b/s": 1.0, "byte/s": 1.0, "bytes/s": 1.0, "bit/s": 0.125, "bps": 0.125}
_PREFIX = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_RATE = re.compile(r"\s*([0-9.]+(?:e[+-]?\d+)?)\s*([kmgt]?)(b/s|bytes?/s|bit/s|bps)\s*", re.IGNORECASE)


def device_of(name: str) -> Device:
    """
    Raises:
        ConfigError: lists the known ones.
    """
    if name not in DEVICES:
        raise ConfigError(f"--device {name} is not in the table: {', '.join(DEVICES)}. For another give --rates, "
                          "a file of farskip calibrate")
    return DEVICES[name]


def link_of(text: str) -> Link:
    """A name of ``LINKS``, or a rate that payload reaches: "50GB/s", "400Gbit/s".

    Raises:
        ConfigError: it is neither.
    """
    if text in LINKS:
        return LINKS[text]
    match = _RATE.fullmatch(text)
    try:
        rate = float(match[1]) * _PREFIX[match[2].lower()] * _UNITS[match[3].lower()] if match else 0.0
    except ValueError:
        rate = 0.0
    if not rate > 0:
        raise ConfigError(f"link {text!r}: neither one of {', '.join(LINKS)} nor a rate above 0 such as 50GB/s or 400Gbit/s")
    return Link(rate, 1.0, 30e-6, "as given")


def rates_of(device: Device, link: Link) -> Rates:
    return Rates(matmul_flops=device.flops * MATMUL_SHARE, attention_flops=device.flops * ATTENTION_SHARE,
                 memory_bytes=device.memory_bytes * MEMORY_SHARE, kernel_overhead=KERNEL_OVERHEAD, link_bytes=link.rate,
                 link_latency=link.latency, link_compute_share=0.0)
