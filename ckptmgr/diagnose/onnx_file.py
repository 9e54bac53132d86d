"""ONNX models: a protocol buffer without a magic number, recognised by its fields."""

from __future__ import annotations

from dataclasses import dataclass, field

from ckptmgr.diagnose.artifact import Artifact, TensorFacts
from ckptmgr.diagnose.byte_source import ByteSource, Window
from ckptmgr.diagnose.installed import compared, installed_version
from ckptmgr.diagnose.plain_words import clean, listed, plural
from ckptmgr.diagnose.protobuf import BadProtobufError, Field, fields, small_text, varint

__all__ = ["OnnxModel", "onnx_artifact", "read_onnx"]

_MAX_TENSORS = 100_000
_DTYPES = {
    1: "float32",
    2: "uint8",
    3: "int8",
    4: "uint16",
    5: "int16",
    6: "int32",
    7: "int64",
    8: "string",
    9: "bool",
    10: "float16",
    11: "float64",
    12: "uint32",
    13: "uint64",
    14: "complex64",
    15: "complex128",
    16: "bfloat16",
    17: "float8_e4m3fn",
    18: "float8_e4m3fnuz",
    19: "float8_e5m2",
    20: "float8_e5m2fnuz",
    21: "uint4",
    22: "int4",
    23: "float4_e2m1fn",
}


@dataclass(slots=True)
class OnnxModel:
    """What an ONNX model tells: versions, weights, and the files beside it that hold weights."""

    ir_version: int = 0
    producer: str = ""
    producer_version: str = ""
    opsets: dict[str, int] = field(default_factory=dict)
    graph: str = ""
    nnodes: int = 0
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    tensors: list[TensorFacts] = field(default_factory=list)
    external_files: set[str] = field(default_factory=set)
    is_cut_off: bool = False


def read_onnx(source: ByteSource) -> OnnxModel | None:
    """Return what a model tells; None if the file is no ONNX model."""
    model = OnnxModel()
    has_graph = False
    try:
        for part in fields(source, 0, source.nbytes):
            if part.number == 1 and part.wire == 0:
                model.ir_version = part.value
            elif part.number == 2:
                model.producer = clean(small_text(source, part))
            elif part.number == 3:
                model.producer_version = clean(small_text(source, part))
            elif part.number == 8 and part.wire == 2:
                domain, version = "", 0
                for entry in fields(source, part.start, part.start + part.value, limit=10):
                    domain = clean(small_text(source, entry)) if entry.number == 1 else domain
                    version = entry.value if entry.number == 2 and entry.wire == 0 else version
                if len(model.opsets) < 50:
                    model.opsets[domain or "ai.onnx"] = version
            elif part.number == 7 and part.wire == 2:
                has_graph = True
                _graph(source, part, model)
            elif part.number > 25:
                return None
    except BadProtobufError:
        model.is_cut_off = True
        has_graph = has_graph or _begins_a_graph(source)
    # The smallest version of the format is 1; a text or an image has other numbers here.
    is_model = has_graph and 1 <= model.ir_version <= 100 and (bool(model.opsets) or model.is_cut_off)
    return model if is_model and (not model.is_cut_off or bool(model.producer)) else None


def _begins_a_graph(source: ByteSource) -> bool:
    """Say whether the field that reaches behind the end of the file is the graph."""
    window = Window(source)
    try:
        for _ in range(20):
            tag = varint(window)
            if tag == (7 << 3 | 2):
                return True
            if tag & 7 == 0:
                varint(window)
            elif tag & 7 == 2:
                window.skip(varint(window))
            else:
                return False
    except (EOFError, BadProtobufError):
        return False
    return False


def _graph(source: ByteSource, graph: Field, model: OnnxModel) -> None:
    for part in fields(source, graph.start, graph.start + graph.value, limit=2_000_000):
        if part.wire != 2:
            continue
        if part.number == 1:
            model.nnodes += 1
        elif part.number == 2:
            model.graph = clean(small_text(source, part))
        elif part.number == 5 and len(model.tensors) < _MAX_TENSORS:
            _tensor(source, part, model)
        elif part.number in (11, 12):
            names = model.inputs if part.number == 11 else model.outputs
            inner = fields(source, part.start, part.start + part.value, limit=20)
            name = next((small_text(source, each) for each in inner if each.number == 1), "")
            if len(names) < 1000:
                names.append(clean(name))


def _tensor(source: ByteSource, part: Field, model: OnnxModel) -> None:
    name, dtype, shape, is_external, location = "", 0, [], False, ""
    for entry in fields(source, part.start, part.start + part.value):
        if entry.number == 1 and entry.wire == 0:
            shape.append(entry.value)
        elif entry.number == 1 and entry.wire == 2:
            window = Window(source, entry.start)
            while window.position < entry.start + entry.value and len(shape) < 64:
                shape.append(varint(window))
        elif entry.number == 2 and entry.wire == 0:
            dtype = entry.value
        elif entry.number == 8:
            name = clean(small_text(source, entry, limit=1000), 300)
        elif entry.number == 14 and entry.wire == 0:
            is_external = entry.value == 1
        elif entry.number == 13 and entry.wire == 2:
            pair = {
                each.number: small_text(source, each, limit=1000)
                for each in fields(source, entry.start, entry.start + entry.value, limit=10)
            }
            location = pair.get(2, "") if pair.get(1) == "location" else location
    model.tensors.append(TensorFacts(name, _DTYPES.get(dtype, f"onnx dtype {dtype}"), tuple(shape[:64])))
    if is_external and len(model.external_files) < 1000:
        model.external_files.add(location)


def onnx_artifact(source: ByteSource, place: str, model: OnnxModel, missing: list[str]) -> Artifact:
    """Describe a model.

    Args:
        source: Its file.
        place: As it was named.
        model: What it tells.
        missing: Which of its external files are not beside it.
    """
    producer = f"{model.producer} {model.producer_version}".strip()
    versions = {"onnx ir": str(model.ir_version)}
    versions.update({f"opset {domain}": str(version) for domain, version in model.opsets.items()})
    if producer:
        versions["producer"] = producer
    problems = [f"the file {clean(name)!r}, which holds weights of it, is not beside it" for name in missing]
    if model.is_cut_off:
        problems.insert(0, f"truncated: its graph is not whole; the file ends after {source.nbytes} bytes")
    return Artifact(
        place=place,
        kind="onnx",
        title=f"an ONNX model of {plural(model.nnodes, 'node')}" + (f", written by {producer}" if producer else ""),
        certainty="likely" if model.is_cut_off else "certain",
        nbytes=source.nbytes,
        versions=versions,
        tensors=tuple(model.tensors),
        contents={"inputs": listed(model.inputs, 10), "outputs": listed(model.outputs, 10)},
        problems=tuple(problems),
        advice=(
            f"onnxruntime.InferenceSession({place!r}) runs it; onnx.load({place!r}) reads it",
            compared("onnx", None, installed_version("onnx")),
            "PyTorch does not load it: onnx2torch converts some models; weights alone: onnx.numpy_helper.to_array",
        ),
        details={"graph": model.graph, "external_files": sorted(clean(name) for name in model.external_files)},
    )
