"""`k2dist verify`: every byte of a checkpoint, and what its model computes, against what they should be."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from k2dist.cli.bar import bar
from k2dist.cli.comparison import Comparison, compare
from k2dist.cli.shown import print_json
from k2dist.config import read_architecture
from k2dist.errors import CheckpointError
from k2dist.messages import Message

NUM_FAULTS_SHOWN = 20
LOGIT_TOLERANCE = 1e-4  # of the largest logit; two right implementations in float32 are a tenth of it apart


class VerifyReport(Message, frozen=True, kw_only=True):
    """A checkpoint in which nothing is wrong."""

    model: str
    num_tensors: int
    num_bytes: int
    index_total_size: float | None  # as the index says; a wrong one is mentioned, since nothing reads it
    file_tensor_bytes: int  # of every tensor in the files, leftovers too: what it should say
    manifest: str
    is_new_manifest: bool
    num_published_sums: int  # that were found beside the files, and hold
    unused_files: tuple[str, ...]  # safetensors that the index does not name: nothing reads them
    transformers: Comparison


def verify(
    model: Annotated[Path, typer.Argument(help="Model directory.")],
    manifest: Annotated[
        Path | None, typer.Option(help="Where the checksums are; default: beside the checkpoint.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Say what was found as one JSON object.")] = False,
) -> None:
    """Check names, sizes, values and checksums of a checkpoint, and its logits against transformers.

    Checksums of tensors are written where there are none; each rank checks its own when it starts. Checksums
    of files are checked where they came with them: SHA256SUMS, or what huggingface_hub notes of a download.
    """
    # With torch: not for `stop` and `chat`.
    from k2dist.checkpoint.index_size import index_size
    from k2dist.checkpoint.manifest import MANIFEST_NAME, ManifestChecker, read_manifest, write_manifest
    from k2dist.checkpoint.published_sums import published_sums, sum_faults
    from k2dist.checkpoint.survey import survey, unused_files

    architecture = read_architecture(model)
    path = manifest or model / MANIFEST_NAME
    is_new = not path.exists()
    checker = None if is_new else ManifestChecker(read_manifest(path), architecture, str(path))
    sums = published_sums(model)
    with bar("read", is_quiet=as_json, in_bytes=True) as show:
        found = survey(model, architecture, show)
        wrong_sums = sum_faults(model, sums, show)
    differences = () if checker is None else checker.differences(found.manifest)
    _raise_faults(model, [*found.faults, *differences, *wrong_sums])
    size = index_size(model)
    if is_new:
        write_manifest(path, found.manifest)
    report = VerifyReport(
        model=str(model),
        num_tensors=len(found.manifest.digests),
        num_bytes=found.num_bytes,
        index_total_size=size.said,
        file_tensor_bytes=size.found,
        manifest=str(path),
        is_new_manifest=is_new,
        num_published_sums=len(sums),
        unused_files=unused_files(model),
        transformers=compare(model, architecture),
    )
    off = report.transformers.off
    if off is not None and not off <= LOGIT_TOLERANCE:  # NaN is a fault too
        raise CheckpointError(
            f"{model}: logits are {off:.2g} of the largest away from transformers' ones "
            f"(at most {LOGIT_TOLERANCE:g})"
        )
    if as_json:
        print_json(report)
    else:
        typer.echo(_as_text(report))


def _raise_faults(model: Path, faults: list[str]) -> None:
    """A line per fault, up to a screenful."""
    if faults:
        rest = len(faults) - NUM_FAULTS_SHOWN
        more = [f"and {rest} faults more"] if rest > 0 else []
        raise CheckpointError("\n".join(f"{model}: {line}" for line in faults[:NUM_FAULTS_SHOWN] + more))


def _as_text(report: VerifyReport) -> str:
    were = "written to" if report.is_new_manifest else "as in"
    comparison = report.transformers
    if comparison.off is None:
        logits = f"logits not compared with transformers: {comparison.reason}"
    else:
        off = f"at most {comparison.off:.1g} of the largest away"
        logits = f"logits as of transformers {comparison.version}, {off}"
    sums = f"{report.num_published_sums} published SHA-256 of files hold"
    if not report.num_published_sums:
        sums = "no checksums of files came with them: bytes are held to the first `k2dist verify` alone"
    lines = [
        f"{report.model}: {report.num_tensors:,} tensors, {report.num_bytes:,} bytes, nothing wrong",
        f"checksums {were} {report.manifest}; {sums}",
        logits,
    ]
    said = report.index_total_size
    if said is not None and said != report.file_tensor_bytes:
        lines.append(
            f"the index's total_size is {said:,.0f}, and its files hold {report.file_tensor_bytes:,} bytes "
            "of tensors: nothing reads it, but is the index of the same upload as the files?"
        )
    lines += [f"{name}: not in the index, and never read; remove it?" for name in report.unused_files]
    return "\n".join(lines)
