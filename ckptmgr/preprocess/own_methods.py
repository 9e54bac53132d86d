"""Objects that give and take their own state: state_dict, to_json, to_dict."""

from __future__ import annotations

from typing import Any

from ckptmgr.errors import StateMismatchError
from ckptmgr.preprocess.class_names import class_name
from ckptmgr.preprocess.encoded import as_tensors, cannot_encode
from ckptmgr.preprocess.kind import Allow
from ckptmgr.preprocess.reading import reading_state
from ckptmgr.preprocess.reviewed import allowed_class, is_same_class
from ckptmgr.state.trees import copied_tree

__all__ = ["DictKind", "JsonKind", "StatefulKind", "called"]


def called(value: Any, raw: Any) -> Any:
    """Use an object of the program's own: call it, or its ``encode``; adds no batch dimension.

    Raises:
        UsageError: It has neither.
    """
    encode = value if callable(value) else getattr(value, "encode", None)
    if not callable(encode):
        raise cannot_encode(f"a {class_name(value)}", "it cannot be called, and has no encode()")
    return as_tensors(encode(raw))


def _has(value: object, method: str) -> bool:
    return callable(getattr(type(value), method, None))


class StatefulKind:
    """Objects with ``state_dict`` and ``load_state_dict``, which may change in training.

    The tree is ``{"class": name, "state": state_dict}``. Built by calling the class without arguments.
    """

    name = "stateful"
    version = 1
    changes_in_training = True

    def handles(self, value: object) -> bool:
        """Say whether it has both methods."""
        return _has(value, "state_dict") and _has(value, "load_state_dict")

    def capture(self, value: Any) -> dict[str, Any]:
        """Return the object's state dict."""
        return {"class": class_name(value), "state": value.state_dict()}

    def build(self, tree: Any, allow: Allow) -> Any:
        """Make an object of the class, and load the state."""
        with reading_state(self.name):
            cls = allowed_class(tree["class"], allow)
            try:
                value = cls()
            except TypeError as error:
                raise StateMismatchError(
                    f"a {tree['class']} cannot be built from the checkpoint alone",
                    why=f"its constructor needs arguments, which a state dict does not tell: {error}",
                    next="build it in the program and restore into it, or give the class to_dict() and from_dict()",
                ) from error
            if not self.handles(value):
                raise ValueError(f"a {tree['class']} has no state_dict() and load_state_dict()")
            value.load_state_dict(copied_tree(tree["state"]))
            return value

    def is_restorable(self, value: Any) -> bool:
        """Say yes."""
        return True

    def restore(self, value: Any, tree: Any) -> None:
        """Hand the state to the live object."""
        value.load_state_dict(copied_tree(tree["state"]))

    def encode(self, value: Any, raw: Any) -> Any:
        """Call the object, or its encode()."""
        return called(value, raw)


class DictKind:
    """Objects with ``to_dict``, and ``from_dict`` on the class.

    The tree is ``{"class": name, "state": what the first gives}``.
    """

    name = "to-dict"
    version = 1
    changes_in_training = False
    _give, _take = "to_dict", "from_dict"

    def handles(self, value: object) -> bool:
        """Say whether it has both methods."""
        return not isinstance(value, type) and _has(value, self._give) and _has(value, self._take)

    def capture(self, value: Any) -> dict[str, Any]:
        """Return what the object gives."""
        return {"class": class_name(value), "state": getattr(value, self._give)()}

    def build(self, tree: Any, allow: Allow) -> Any:
        """Let the class make an object."""
        with reading_state(self.name):
            cls = allowed_class(tree["class"], allow)
            return getattr(cls, self._take)(copied_tree(tree["state"]))

    def is_restorable(self, value: Any) -> bool:
        """Say whether the object's state lies in attributes."""
        return hasattr(value, "__dict__")

    def restore(self, value: Any, tree: Any) -> None:
        """Give the live object the attributes of the saved one.

        Raises:
            StateMismatchError: The classes differ.
        """
        if not is_same_class(value, tree["class"]) or not self.is_restorable(value):
            raise StateMismatchError(
                f"a {class_name(value)} cannot become the saved {tree['class']} in place",
                next="use the preprocessor of the checkpoint: ckptmgr.load_inference(...).preprocessor",
            )
        saved = self.build(tree, lambda name: type(value))
        vars(value).clear()
        vars(value).update(vars(saved))

    def encode(self, value: Any, raw: Any) -> Any:
        """Call the object, or its encode()."""
        return called(value, raw)


class JsonKind(DictKind):
    """Objects with ``to_json``, and ``from_json`` on the class; the JSON is a text, or a dict."""

    name = "to-json"
    _give, _take = "to_json", "from_json"
