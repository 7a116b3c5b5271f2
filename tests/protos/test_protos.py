"""The committed generated code is that of `protos/`, and the wire format stays what it was."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from google.protobuf import descriptor_pb2
from google.protobuf.message import Message

from k2dist._proto.v1 import control_pb2, observe_pb2
from k2dist._proto.v1 import inference_pb2 as pb

ROOT = Path(__file__).resolve().parents[2]


def load_generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "protos" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_code_is_fresh() -> None:
    wanted = load_generator().generated_files()
    package = ROOT / "k2dist" / "_proto"
    there = {
        str(path.relative_to(package)): path.read_text()
        for path in package.rglob("*.py*")
        if "__pycache__" not in path.parts
    }
    assert set(there) == set(wanted)
    stale = [name for name, text in wanted.items() if there[name] != text]
    assert not stale, "run `make protos`"


def schema_lines(file: descriptor_pb2.FileDescriptorProto) -> list[str]:
    """One line per field, enum value and RPC: all that the wire and generated names depend on."""
    lines: list[str] = []

    def take(prefix: str, messages: list[descriptor_pb2.DescriptorProto]) -> None:
        for message in messages:
            name = f"{prefix}.{message.name}"
            for f in message.field:
                kind = f.type_name or f.Type.Name(f.type)
                presence = " optional" if f.proto3_optional else ""
                repeated = " repeated" if f.label == f.LABEL_REPEATED else ""
                lines.append(f"{name}.{f.name} = {f.number} {kind}{presence}{repeated}")
            for enum in message.enum_type:
                lines.extend(f"{name}.{enum.name}.{value.name} = {value.number}" for value in enum.value)
            take(name, list(message.nested_type))

    take(file.package, list(file.message_type))
    for enum in file.enum_type:
        lines += [f"{file.package}.{enum.name}.{value.name} = {value.number}" for value in enum.value]
    for service in file.service:
        for method in service.method:
            stream = "stream " if method.server_streaming else ""
            lines.append(
                f"rpc {service.name}.{method.name}({method.input_type}) {stream}{method.output_type}"
            )
    return lines


def test_the_schema_only_grows() -> None:
    """golden_schema.txt has every name, number and type ever released: add lines to it, change none."""
    there: list[str] = []
    for module in (pb, control_pb2, observe_pb2):
        file = descriptor_pb2.FileDescriptorProto()
        module.DESCRIPTOR.CopyToProto(file)
        there += schema_lines(file)
    golden = (Path(__file__).with_name("golden_schema.txt")).read_text().splitlines()
    assert [line for line in golden if line not in there] == [], "changed or taken away"
    assert [line for line in there if line not in golden] == [], "new: add these to golden_schema.txt"


WIRE: list[tuple[Message, str]] = [
    (
        pb.GenerateRequest(
            request_id="r", token_ids=pb.TokenIds(ids=[1, 300]), sampling=pb.Sampling(temperature=0.0, seed=0)
        ),
        "1201722205 0a03 01ac02 320b 090000000000000000 4800",
    ),
    (
        pb.GenerateEvent(delta=pb.Delta(output_index=0, first_index=3, token_ids=[7], text="a")),
        "1208 1003 1a0107 220161",
    ),
    (
        pb.GenerateEvent(
            finished=pb.Finished(reason=pb.FINISH_REASON_TOOL_CALLS, stop_match=pb.StopMatch(token_id=9))
        ),
        "1a06 1003 1a02 1009",
    ),
]


@pytest.mark.parametrize(("message", "wire"), WIRE, ids=lambda value: type(value).__name__)
def test_bytes_on_the_wire_are_these(message: Message, wire: str) -> None:
    assert message.SerializeToString(deterministic=True) == bytes.fromhex(wire)
    assert type(message).FromString(bytes.fromhex(wire)) == message


def test_every_scalar_of_sampling_can_be_absent() -> None:
    fields = [f for f in pb.Sampling.DESCRIPTOR.fields if not f.is_repeated]
    assert len(fields) == 13
    assert all(f.has_presence for f in fields)
