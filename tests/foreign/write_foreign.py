"""Writes the files of other frameworks below ``files/``, each by its own tool, as small as they go.

They are committed, because these frameworks are no dependencies of ours. Run again with:

    python -m venv A && A/bin/pip install tensorflow_cpu keras h5py onnx gguf
    python -m venv B && B/bin/pip install flax orbax-checkpoint
    A/bin/python tests/foreign/write_foreign.py tensorflow
    B/bin/python tests/foreign/write_foreign.py jax

Versions are recorded in ``files/versions.json``.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import sys
from pathlib import Path

FILES = Path(__file__).parent / "files"


def fresh(name: str) -> Path:
    place = FILES / name
    if place.is_dir():
        shutil.rmtree(place)
    place.unlink(missing_ok=True)
    return place


def write_tensorflow() -> None:
    import keras
    import tensorflow as tf

    class Scale(tf.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = tf.Variable(tf.ones([2, 3]), name="weight")

        @tf.function(input_signature=[tf.TensorSpec([None, 2], tf.float32)])
        def __call__(self, x: tf.Tensor) -> tf.Tensor:
            return x @ self.weight

    model = Scale()
    tf.saved_model.save(model, str(fresh("tf_saved_model")))
    folder = fresh("tf_checkpoint")
    folder.mkdir()
    step = tf.Variable(7, dtype=tf.int64)
    manager = tf.train.CheckpointManager(tf.train.Checkpoint(model=model, step=step), str(folder), max_to_keep=1)
    manager.save()

    keras.utils.set_random_seed(0)
    net = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3, name="hidden"), keras.layers.Dense(1, name="out")])
    net.save(fresh("model.keras"))
    net.save_weights(fresh("model.weights.h5"))
    net.save(fresh("model.h5"))
    # Keras stores the code of a lambda, and with it the name of the file that it stands in.
    add_one = eval(compile("lambda x: x + 1", "<model>", "eval"))
    shifted = keras.Sequential([keras.Input((2,)), keras.layers.Lambda(add_one)])
    shifted.save(fresh("lambda.keras"))


def write_onnx() -> None:
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weight = numpy_helper.from_array(np.ones((2, 3), np.float32), "weight")
    bias = numpy_helper.from_array(np.zeros(3, np.float16), "bias")
    node = helper.make_node("MatMul", ["x", "weight"], ["y"])
    graph = helper.make_graph(
        [node],
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
        [weight, bias],
    )
    model = helper.make_model(graph, producer_name="tests", producer_version="1.0")
    onnx.save(model, fresh("model.onnx"))
    large = numpy_helper.from_array(np.ones((16, 32), np.float32), "weight")
    graph.initializer[0].CopyFrom(large)
    folder = fresh("onnx_external")
    folder.mkdir()
    onnx.save(
        helper.make_model(graph, producer_name="tests"),
        folder / "model.onnx",
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
    )


def write_gguf() -> None:
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(fresh("model.gguf"), "llama")
    writer.add_name("tiny")
    writer.add_block_count(1)
    writer.add_token_list(["<s>", "</s>", "a", "b"])
    writer.add_tensor("token_embd.weight", np.ones((4, 32), np.float32))
    writer.add_tensor("output.weight", np.ones((4, 32), np.float16))
    packed = gguf.quants.quantize(np.ones((4, 32), np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.ffn.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_jax() -> None:
    import flax.serialization
    import jax.numpy as jnp
    import orbax.checkpoint as ocp

    tree = {"params": {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3, jnp.bfloat16)}}, "step": 7}
    fresh("flax.msgpack").write_bytes(flax.serialization.msgpack_serialize(tree))
    place = fresh("orbax").resolve()
    checkpointer = ocp.StandardCheckpointer()
    checkpointer.save(place, {"params": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}, "step": jnp.int32(7)})
    checkpointer.wait_until_finished()
    # It names the absolute place.
    (place / "commit_success.txt").write_text("Checkpoint commit was successful to orbax")


def record_versions(*distributions: str) -> None:
    file = FILES / "versions.json"
    versions = json.loads(file.read_text()) if file.exists() else {}
    versions.update({name: importlib.metadata.version(name) for name in distributions})
    file.write_text(json.dumps(dict(sorted(versions.items())), indent=2) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    FILES.mkdir(exist_ok=True)
    if sys.argv[1] == "tensorflow":
        write_tensorflow()
        write_onnx()
        write_gguf()
        record_versions("tensorflow_cpu", "keras", "h5py", "onnx", "gguf")
    else:
        write_jax()
        record_versions("flax", "orbax-checkpoint", "jax")
