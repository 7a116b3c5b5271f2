"""What an estimate takes for granted besides the devices' peaks: every such number, in this one place.

Shares are of a device's peak (`devices`). None of them was measured by k2dist on a GPU yet; each says where
it comes from. They stand in every plan's JSON beside the figures that rest on them.
"""

from __future__ import annotations

from k2dist.messages import Message


class Assumptions(Message, frozen=True, kw_only=True):
    """See the module. Another value of any: `msgspec.structs.replace`."""

    # -- shares of a peak ------------------------------------------------------------------------------

    memory: float = 0.75  # bytes of a product's weights; a copy reaches 0.85 to 0.9 on Hopper
    decode_memory: float = 0.7  # latents under a decode row; FlashMLA: 3,000 of 3,350 GB/s on an H800
    bf16: float = 0.65  # large products; cuBLAS reaches about 0.8 on Hopper
    float8: float = 0.5  # with scales of blocks; DeepGEMM: up to 1,550 of 1,979 TFLOPS
    grouped: float = 0.45  # of many experts, the last tile of each in part empty
    attention: float = 0.5  # over latents or decompressed; FlashMLA: 660 of 989 TFLOPS
    link: float = 0.7  # inside a node, all to all; one pair reaches 372 of 450 GB/s (NVIDIA/nccl#1264)
    nic: float = 0.7  # between nodes, all to all; a ring reaches 46 to 48 of 50 GB/s (nccl-tests#290)

    # -- waits -----------------------------------------------------------------------------------------

    collective_s: float = 25e-6  # the least of one inside a node; NCCL, by our guess
    far_collective_s: float = 45e-6  # likewise, where any two members are on different nodes
    peer_s: float = 0.5e-6  # more for each member: all to all is a message to everybody
    cpu_collective_s: float = 1.5e-3  # over gloo; 2 to 8 processes on two cores: 0.25 to 4.4 ms, measured
    host_step_s: float = 1.5e-3  # plan, agree, batch: the step loop's own, beside the device
    agree_peer_s: float = 20e-6  # of it for each rank in the agreement before a step
    host_row_s: float = 1.1e-6  # planning and committing one row, measured (k2dist bench scheduler)
    launch_s: float = 5e-6  # one kernel by Python and the driver; the host does it while the device computes
    kernels_per_layer: int = 40  # counted: what a MoE layer launches
    sync_s: float = 30e-6  # the host hears a count from the device: twice a layer with exact splits
    gap_s: float = 1.5e-6  # between two kernels, of a graph or launched in time

    # -- experts ---------------------------------------------------------------------------------------

    # Times the mean load, on the rank that most of a layer's rows go to; every layer waits for it. SGLang's
    # balancing gave 1.49 times the prefill and 2.54 times the decode throughput: peers.md B, row 11.
    imbalance: float = 1.5

    # -- start -----------------------------------------------------------------------------------------

    disk_rate: float = 2e9  # bytes a second that one node reads of a checkpoint; NVMe gives 7, NFS 0.5 to 2
    start_s: float = 30.0  # placement group, processes, torch; measured: 5 s for four on two cores
    layout_rate: float = 4e9  # bytes a second that a rank lays out for its kernels, after reading them
    test_rate: float = 8e9  # and reads once more for its self-test
    join_s: float = 5.0  # groups of a generation; NCCL's communicators
    compile_s: float = 60.0  # all kernels that K2's steps take, on two cores; nothing where they are kept
    capture_s: float = 1.5  # one graph, and the step before it
    graph_bytes: int = 50_000_000  # of one graph: 2,440 nodes with their arguments, 20 KB each

    # -- recovery --------------------------------------------------------------------------------------

    detect_s: float = 1.0  # that a rank has died; 0.03 s by Ray for a process, a heartbeat for a node
    restart_s: float = 10.0  # a new process with torch, on a node that is there; 1.9 s for one, measured


ASSUMED = Assumptions()
