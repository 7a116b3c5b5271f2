"""What a device offers, by name: the one table of hardware facts, each with its source.

Rates are peaks as makers state them, dense (no sparsity) and one way; what of them is reached is assumed in
`assumptions`. Memory is what the driver reports. A node's links and cards are shared by nobody: each device
has its own `link` to the others of its node and its own network card.
"""

from __future__ import annotations

from k2dist.config.cluster import ClusterConfig
from k2dist.errors import ConfigError
from k2dist.messages import Message


class Device(Message, frozen=True, kw_only=True):
    """One rank's device. Bytes and operations a second; a multiply-add counts two operations.

    `memory_bytes`: None where it is the machine's (nodes.device_bytes says what a rank has of it).
    `float8_flops`: None: no float8 products. `float8`: which e4m3 its instructions take. `has_run`: k2dist's
    kernels have computed on it; else a plan is all there is.
    """

    name: str
    memory_bytes: int | None
    memory_rate: float
    bf16_flops: float
    float8_flops: float | None
    float8: str  # e4m3fn (what checkpoints hold), e4m3fnuz, or none
    link_rate: float  # to the other devices of the node, all together
    nic_rate: float  # to other nodes
    node_devices: int  # of a usual node
    has_run: bool
    sources: dict[str, str]  # field -> where its value is from


_HOPPER = {
    "bf16_flops": "NVIDIA H100 and H200 datasheets: 1,979 TFLOPS with sparsity, half of it dense",
    "float8_flops": "the same: 3,958 TFLOPS with sparsity, half of it dense",
    "link_rate": "the same: NVLink 900 GB/s both ways",
    "nic_rate": "DGX H100 and H200 user guides: a ConnectX-7 of 400 Gb/s for each GPU",
}

DEVICES = {
    device.name: device
    for device in (
        Device(
            name="h200",
            memory_bytes=150_000_000_000,
            memory_rate=4.8e12,
            bf16_flops=989.5e12,
            float8_flops=1979e12,
            float8="e4m3fn",
            link_rate=450e9,
            nic_rate=50e9,
            node_devices=8,
            has_run=False,
            sources=_HOPPER
            | {
                "memory_bytes": "141 GB by the datasheet; CUDA reports about 139.7 GiB",
                "memory_rate": "NVIDIA H200 datasheet",
            },
        ),
        Device(
            name="h100",
            memory_bytes=84_900_000_000,
            memory_rate=3.35e12,
            bf16_flops=989.5e12,
            float8_flops=1979e12,
            float8="e4m3fn",
            link_rate=450e9,
            nic_rate=50e9,
            node_devices=8,
            has_run=False,
            sources=_HOPPER
            | {
                "memory_bytes": "80 GB (SXM5) by the datasheet; CUDA reports about 79.1 GiB",
                "memory_rate": "NVIDIA H100 SXM datasheet",
            },
        ),
        Device(
            name="b200",
            memory_bytes=191_500_000_000,
            memory_rate=8e12,
            bf16_flops=2250e12,
            float8_flops=4500e12,
            float8="e4m3fn",
            link_rate=900e9,
            nic_rate=50e9,
            node_devices=8,
            has_run=False,
            sources={
                "memory_bytes": "180 GB (HGX B200) by the datasheet; CUDA reports about 178.35 GiB",
                "memory_rate": "NVIDIA HGX B200 datasheet: 64 TB/s for eight",
                "bf16_flops": "the same: 36 PFLOPS with sparsity for eight, half of it dense",
                "float8_flops": "the same: 72 PFLOPS with sparsity for eight, half of it dense",
                "link_rate": "the same: NVLink 1.8 TB/s both ways",
                "nic_rate": "DGX B200 user guide: a ConnectX-7 of 400 Gb/s for each GPU",
            },
        ),
        Device(
            name="mi355x",
            memory_bytes=288_000_000_000,
            memory_rate=8e12,
            bf16_flops=2500e12,
            float8_flops=5000e12,
            float8="e4m3fn",
            link_rate=537.6e9,
            nic_rate=50e9,
            node_devices=8,
            has_run=False,
            sources={
                "memory_bytes": "AMD Instinct MI355X data sheet; what its driver reports we have not seen",
                "memory_rate": "the same",
                "bf16_flops": "the same: 2.5 PFLOPS dense",
                "float8_flops": "the same: 5.0 PFLOPS dense",
                "float8": "CDNA 4 takes OCP's e4m3fn (rocm.docs.amd.com, MI350); MI300's is the fnuz kind",
                "link_rate": "the same: 7 Infinity Fabric links of 153.6 GB/s both ways, one to each peer",
                "nic_rate": "usual platforms: a card of 400 Gb/s for each GPU",
            },
        ),
        Device(
            name="a100",
            memory_bytes=84_900_000_000,
            memory_rate=2.039e12,
            bf16_flops=312e12,
            float8_flops=None,
            float8="none",
            link_rate=300e9,
            nic_rate=25e9,
            node_devices=8,
            has_run=False,
            sources={
                "memory_bytes": "80 GB (SXM) by the datasheet; taken as an H100's",
                "memory_rate": "NVIDIA A100 80GB SXM datasheet",
                "bf16_flops": "the same: 312 TFLOPS dense",
                "float8_flops": "the same: there is none before compute capability 8.9",
                "link_rate": "the same: NVLink 600 GB/s both ways",
                "nic_rate": "DGX A100 user guide: a ConnectX-6 of 200 Gb/s for each GPU",
            },
        ),
        Device(
            name="cpu",
            memory_bytes=None,
            memory_rate=29e9,
            bf16_flops=355e9,
            float8_flops=355e9,
            float8="e4m3fn",
            link_rate=5e9,
            nic_rate=1.25e9,
            node_devices=1,
            has_run=True,
            sources={
                "memory_rate": "measured: two cores of a Xeon with AMX, shared by all ranks there",
                "bf16_flops": "measured likewise, bfloat16 products",
                "float8_flops": "native kernels widen float8 to bfloat16 on the way",
                "float8": "as the file holds it: widened by table",
                "link_rate": "assumed: gloo between processes of one machine copies through memory",
                "nic_rate": "assumed: 10 Gb/s Ethernet",
            },
        ),
    )
}


def find_device(name: str) -> Device:
    """Raises `ConfigError` for a name that is not in the table."""
    if name not in DEVICES:
        raise ConfigError(f"nodes.device={name}: no such device here; use {', '.join(DEVICES)}")
    return DEVICES[name]


def configured_device(config: ClusterConfig) -> Device:
    """The one that `nodes.device` names; a config that names none and takes no GPUs computes on CPUs.

    Raises `ConfigError` for a GPU cluster that names none.
    """
    if config.nodes.device is not None:
        return find_device(config.nodes.device)
    if config.ranks.rank_gpus == 0:
        return DEVICES["cpu"]
    raise ConfigError(
        f"nodes.device: missing, and ranks.rank_gpus={config.ranks.rank_gpus:g}; name the device, such as "
        f"{', '.join(name for name in DEVICES if name != 'cpu')}"
    )


def device_bytes(config: ClusterConfig) -> int | None:
    """Memory of one rank's device: as configured, else as its table says; None: not known."""
    if config.nodes.device_bytes is not None or config.nodes.device is None:
        return config.nodes.device_bytes
    return find_device(config.nodes.device).memory_bytes
