"""Directories that hold a model: of Hugging Face, whole or in shards, with what is missing; adapters; TensorFlow's."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias

from ckptmgr.diagnose.artifact import Artifact, TensorFacts
from ckptmgr.diagnose.folder import Folder, is_inside
from ckptmgr.diagnose.installed import compared, installed_version
from ckptmgr.diagnose.plain_words import clean, listed, plural
from ckptmgr.diagnose.protobuf import BadProtobufError
from ckptmgr.diagnose.tensorflow_files import checkpoint_variables, saved_model_tags, tensorflow_notes
from ckptmgr.words import format_nbytes

__all__ = ["LookAt", "contents_of", "hugging_face", "saved_model", "tensorflow_checkpoint", "weights_of"]

LookAt: TypeAlias = Callable[[Folder, str], Artifact]
"""Describes one file of a folder."""

INDEX_NAMES: Final = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_WHOLE_NAMES: Final = ("model.safetensors", "pytorch_model.bin", "adapter_model.safetensors", "adapter_model.bin")
_SHARD: Final = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.(safetensors|bin)")
_LANGUAGE_MODEL = re.compile(r"LM(Head)?(Model)?$|ConditionalGeneration$|PreTraining$|Seq2Seq")
_TOKENIZER: Final = frozenset(
    [
        "tokenizer.json",
        "tokenizer.model",
        "spiece.model",
        "sentencepiece.bpe.model",
        "vocab.txt",
        "vocab.json",
        "vocab.bpe",
        "merges.txt",
        "tokenizer_config.json",
    ]
)
# Tokenizers of bytes have none of these, and need none.
_VOCABULARY_ENDINGS: Final = (".model", ".txt", ".json", ".tiktoken", ".spm", ".codes", ".vocab", ".v3", ".bpe")
_OF_BYTES: Final = ("ByT5Tokenizer", "CanineTokenizer", "PerceiverTokenizer")
_PREPROCESSOR: Final = frozenset(
    ["preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"]
)
_MAX_SHARDS = 500
_OTHER_FRAMEWORKS: Final = ("tf_model.h5", "flax_model.msgpack", "model.onnx", "onnx/model.onnx")


def contents_of(folder: Folder) -> dict[str, str]:
    """Return the files that lie directly in a folder, and its subfolders, with sizes."""
    contents: dict[str, str] = {}
    inside: dict[str, list[int]] = {}
    for name, nbytes in folder.files.items():
        first, slash, _ = name.partition("/")
        if slash:
            inside.setdefault(first, []).append(nbytes)
        elif len(contents) < 200:
            contents[clean(name)] = format_nbytes(nbytes)
    for first, sizes in list(inside.items())[:100]:
        contents[f"{clean(first)}/"] = f"{plural(len(sizes), 'file')}, {format_nbytes(sum(sizes))}"
    return contents


def weights_of(folder: Folder, look_at: LookAt) -> tuple[list[TensorFacts], list[str], list[str]] | None:
    """Return the tensors of a model that lies in a folder, whole or in shards.

    Returns:
        Tensors, names of the files that they lie in, and problems; None where there is no such model.
    """
    index: str | None = next((name for name in INDEX_NAMES if name in folder.files), None)
    index = index or next(
        (name for name in folder.top() if name.endswith((".safetensors.index.json", ".bin.index.json"))), None
    )
    if index is not None:
        return _indexed(folder, index, look_at)
    shards = sorted(name for name in folder.top() if _SHARD.fullmatch(name))
    if shards:
        total = int(_group(shards[0], 3))
        stem, ending = _group(shards[0], 1), _group(shards[0], 4)
        wanted = [f"{stem}-{number:05d}-of-{total:05d}.{ending}" for number in range(1, min(total, _MAX_SHARDS) + 1)]
        tensors, problems = _of_files(folder, wanted, look_at)
        problems.append(f"the index, {stem}.{ending}.index.json, is missing")
        return tensors, wanted, problems
    whole = next((name for name in _WHOLE_NAMES if name in folder.files), None)
    if whole is None:
        return None
    tensors, problems = _of_files(folder, [whole], look_at)
    return tensors, [whole], problems


def _group(name: str, number: int) -> str:
    match = _SHARD.fullmatch(name)
    return match.group(number) if match else ""


def _indexed(folder: Folder, index: str, look_at: LookAt) -> tuple[list[TensorFacts], list[str], list[str]]:
    value = folder.json(index)
    weight_map = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        return [], [], [f"the index {index} cannot be read"]
    shards = sorted(set(weight_map.values()))
    outside = [name for name in shards if not is_inside(name)]
    problems = [f"the index names {listed(outside)}, outside of the directory: not looked at"] if outside else []
    shards = [name for name in shards if is_inside(name)][:_MAX_SHARDS]
    tensors, more = _of_files(folder, shards, look_at)
    problems += more
    there = {fact.name for fact in tensors}
    present = {name for name in shards if name in folder.files}
    lost = [clean(name, 300) for name, shard in weight_map.items() if shard in present]
    lost = [name for name in lost if name not in there]
    if lost and not more:
        problems.append(f"the index names {plural(len(lost), 'tensor')} that are in no shard: {listed(lost)}")
    return tensors, shards, problems


def _of_files(folder: Folder, names: list[str], look_at: LookAt) -> tuple[list[TensorFacts], list[str]]:
    missing = [name for name in names if name not in folder.files]
    problems = [f"{'a shard is' if len(missing) == 1 else 'shards are'} missing: {listed(missing)}"] if missing else []
    tensors: list[TensorFacts] = []
    for name in names:
        if name in folder.files:
            artifact = look_at(folder, name)
            tensors += artifact.tensors or ()
            problems += [f"{name}: {problem}" for problem in artifact.problems]
    return tensors, problems[:50]


def hugging_face(folder: Folder, look_at: LookAt) -> Artifact | None:
    """Describe a model directory of Hugging Face, or shards with their index; None if it is neither."""
    found = weights_of(folder, look_at)
    config = folder.json("config.json")
    is_adapter = "adapter_config.json" in folder.files
    is_config = isinstance(config, dict) and bool({"model_type", "architectures"} & config.keys())
    if found is None and not (is_config and _belongs_to_a_model(folder)):
        return None
    tensors, files, problems = found or ([], [], ["its weights are missing"])
    if found is None and any(name in folder.files for name in _OTHER_FRAMEWORKS):
        others: list[str] = [name for name in _OTHER_FRAMEWORKS if name in folder.files]
        problems = [f"it has no weights for PyTorch, but those of another framework: {listed(others)}"]
    is_lone_index = not is_config and not is_adapter and "model.safetensors" not in files
    is_sharded = bool(files) and (len(files) > 1 or bool(_SHARD.fullmatch(files[0])))
    if is_lone_index and is_sharded and all(name.endswith(".safetensors") for name in files):
        return _sharded(folder, tensors, files, problems)
    if is_adapter:
        return _adapter(folder, tensors, problems)
    return _model(folder, config if is_config else None, tensors, files, problems)


def _belongs_to_a_model(folder: Folder) -> bool:
    names = set(folder.top())
    return (
        bool(names & (_TOKENIZER | _PREPROCESSOR | {"generation_config.json", *_OTHER_FRAMEWORKS})) or len(names) <= 3
    )


def _sharded(folder: Folder, tensors: list[TensorFacts], files: list[str], problems: list[str]) -> Artifact:
    return Artifact(
        place=folder.place,
        kind="safetensors-sharded",
        title=f"a model of {plural(len(tensors), 'tensor')} in {plural(len(files), 'safetensors file')}",
        certainty="certain",
        nbytes=folder.nbytes,
        tensors=tuple(tensors),
        contents=contents_of(folder),
        problems=(*problems, *folder.problems),
        advice=(
            ("get the missing or damaged files again; the others can stay",)
            if problems and "index, " not in problems[0]
            else (f"ckptmgr import {shlex.quote(folder.place)} RUN_DIR",)
        ),
    )


def _adapter(folder: Folder, tensors: list[TensorFacts], problems: list[str]) -> Artifact:
    config = folder.json("adapter_config.json")
    values: Mapping[str, Any] = config if isinstance(config, dict) else {}
    base, version = values.get("base_model_name_or_path"), values.get("peft_version")
    kind = clean(str(values.get("peft_type", "PEFT")), 40)
    return Artifact(
        place=folder.place,
        kind="peft-adapter",
        title=f"a {kind} adapter of {plural(len(tensors), 'tensor')}, no whole model",
        certainty="certain",
        nbytes=folder.nbytes,
        versions={"peft": clean(version, 40)} if isinstance(version, str) else {},
        tensors=tuple(tensors),
        contents=contents_of(folder),
        problems=(*problems, *folder.problems),
        advice=(
            f"it goes on top of {clean(str(base), 200)!r}: peft.PeftModel.from_pretrained(model, {folder.place!r})",
            compared("peft", None, installed_version("peft")),
        ),
        details={"base_model": clean(str(base), 200)},
    )


def _model(
    folder: Folder,
    config: Mapping[str, Any] | None,
    tensors: list[TensorFacts],
    files: list[str],
    problems: list[str],
) -> Artifact:
    versions: dict[str, str] = {}
    details: dict[str, Any] = {"files": files[:_MAX_SHARDS]}
    top = set(folder.top())
    if config is None:
        problems.append(
            "config.json cannot be read"
            if "config.json" in top
            else "config.json is missing: the architecture is unknown"
        )
    if not top & (_TOKENIZER | _PREPROCESSOR):
        problems.append(
            "no tokenizer and no preprocessor is here: it takes raw input only with the one it was trained with"
        )
    elif _lacks_vocabulary(folder):
        problems.append("its tokenizer is missing: tokenizer_config.json is here, and no tokenizer.json or vocabulary")
    title = f"a Hugging Face model of {plural(len(tensors), 'tensor')}"
    values = config or {}
    architectures = values.get("architectures")
    if isinstance(architectures, list) and architectures and isinstance(architectures[0], str):
        details["architecture"] = clean(architectures[0])
        title += f", {clean(architectures[0])}"
    if isinstance(values.get("transformers_version"), str):
        versions["transformers"] = clean(values["transformers_version"], 40)
    if isinstance(values.get("auto_map"), dict):
        details["has_code"] = True
        problems.append("its model is code of its own (auto_map): loading it needs trust_remote_code=True")
    names = {fact.name for fact in tensors}
    # Every configuration has it, also of models without such an output layer.
    if values.get("tie_word_embeddings") is True and _LANGUAGE_MODEL.search(str(details.get("architecture", ""))):
        details["tied"] = "the output layer is the input embedding (tie_word_embeddings)"
        if not any(name.endswith(("lm_head.weight", "decoder.weight")) for name in names):
            details["tied"] += ", and is not stored"
        title += f"; {details['tied']}"
    details["tokenizer"] = sorted(top & _TOKENIZER)
    details["preprocessor"] = sorted(top & _PREPROCESSOR)
    advice = [f"ckptmgr import {shlex.quote(folder.place)} RUN_DIR"]
    of = details.get("architecture") or "AutoModel"
    advice.append(f"transformers.{of}.from_pretrained({folder.place!r})")
    advice.append(compared("transformers", versions.get("transformers"), installed_version("transformers")))
    if any("missing" in problem and "shard" in problem for problem in problems):
        advice[0] = "get the missing files again; the others can stay"
    return Artifact(
        place=folder.place,
        kind="hf-model",
        title=title,
        certainty="certain" if config is not None else "likely",
        nbytes=folder.nbytes,
        versions=versions,
        tensors=tuple(tensors) if files else None,
        contents=contents_of(folder),
        problems=(*problems, *folder.problems),
        advice=tuple(advice),
        details=details,
    )


def _lacks_vocabulary(folder: Folder) -> bool:
    """Say whether a tokenizer is described, and nothing that may be its vocabulary lies beside the description."""
    config = folder.json("tokenizer_config.json")
    if not isinstance(config, dict) or config.get("tokenizer_class") in _OF_BYTES:
        return False
    top = set(folder.top())
    described = {"tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json"}
    others = top - described - set(INDEX_NAMES) - _PREPROCESSOR - {"generation_config.json", "trainer_state.json"}
    return not any(name.endswith(_VOCABULARY_ENDINGS) for name in others)


def saved_model(folder: Folder) -> Artifact | None:
    """Describe a SavedModel of TensorFlow; None if it is none."""
    if "saved_model.pb" not in folder.files:
        return None
    problems = list(folder.problems)
    version: str | None = None
    tags: list[str] = []
    try:
        version, tags = saved_model_tags(folder.open("saved_model.pb"))
    except BadProtobufError as error:
        problems.append(f"saved_model.pb is damaged: {error}")
    is_keras = "keras_metadata.pb" in folder.files
    tensors: list[TensorFacts] | None = None
    if "variables/variables.index" in folder.files:
        tensors, nshards, more = checkpoint_variables(folder.open("variables/variables.index"))
        problems += more + _missing_data(folder, "variables/variables", nshards)
    else:
        problems.append("its variables are missing (variables/variables.index)")
    versions = {"tensorflow": version} if version else {}
    advice = [f"tf.saved_model.load({folder.place!r})", *tensorflow_notes(version)]
    if is_keras:
        advice.append("Keras 3 does not load it: tf.keras up to TensorFlow 2.15, tf_keras, or keras.layers.TFSMLayer")
    return Artifact(
        place=folder.place,
        kind="tf-savedmodel",
        title="a SavedModel of TensorFlow"
        + (f" {version}" if version else "")
        + (", made by Keras" if is_keras else ""),
        certainty="certain",
        nbytes=folder.nbytes,
        versions=versions,
        tensors=tuple(tensors) if tensors is not None else None,
        contents=contents_of(folder),
        problems=tuple(problems),
        advice=tuple(advice),
        details={"tags": tags},
    )


def _missing_data(folder: Folder, stem: str, nshards: int) -> list[str]:
    count = min(nshards, 1000)
    wanted = [f"{stem}.data-{number:05d}-of-{nshards:05d}" for number in range(count)]
    missing = [name for name in wanted if name not in folder.files]
    return [f"data files of its variables are missing: {listed(missing)}"] if missing else []


def tensorflow_checkpoint(folder: Folder, stem: str | None = None) -> Artifact | None:
    """Describe a checkpoint of TensorFlow's variables; None if there is none in the folder.

    Args:
        folder: Where it lies.
        stem: Its name without ``.index``; by default that of the newest, by its number.
    """
    stems = sorted(
        (name.removesuffix(".index") for name in folder.top() if name.endswith(".index")),
        key=lambda name: [int(part[:18]) for part in re.findall(r"\d+", name)],
    )
    with_data = [each for each in stems if any(name.startswith(f"{each}.data-") for name in folder.files)]
    if stem is None and "checkpoint" not in folder.files and not with_data:
        return None
    if stem is None and not stems:
        return None
    chosen = stem or (with_data or stems)[-1]
    tensors, nshards, problems = checkpoint_variables(folder.open(f"{chosen}.index"))
    problems += _missing_data(folder, chosen, nshards) + folder.problems
    place = folder.place_of(chosen)
    return Artifact(
        place=folder.place if stem is None else place,
        kind="tf-checkpoint",
        title=f"a TensorFlow checkpoint of {plural(len(tensors), 'variable')}, {clean(chosen)}",
        certainty="certain",
        nbytes=folder.nbytes,
        tensors=tuple(tensors),
        contents=contents_of(folder),
        problems=tuple(problems),
        advice=(
            f"tf.train.load_checkpoint({place!r}) gives its variables; model.load_weights or tf.train.Checkpoint"
            ".restore takes them with the object that they were saved from",
            *tensorflow_notes(None),
        ),
        details={"checkpoints": [clean(each) for each in stems]},
    )
