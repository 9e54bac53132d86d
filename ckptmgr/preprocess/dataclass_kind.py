"""Dataclasses of plain values: class and fields."""

from __future__ import annotations

import dataclasses
from typing import Any

from ckptmgr.errors import CorruptCheckpointError, StateMismatchError
from ckptmgr.preprocess.class_names import class_name
from ckptmgr.preprocess.kind import Allow
from ckptmgr.preprocess.own_methods import called
from ckptmgr.preprocess.parts import Parts
from ckptmgr.preprocess.reading import reading_state
from ckptmgr.preprocess.reviewed import allowed_class, is_same_class

__all__ = ["DataclassKind"]


class DataclassKind:
    """Instances of dataclasses. The tree is ``{"class": name, "fields": {name: value}}``.

    Built without calling the constructor: the fields are set as they were, those that it does not take too.
    """

    name = "dataclass"
    version = 1
    changes_in_training = False

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def handles(self, value: object) -> bool:
        """Say whether it is one."""
        return dataclasses.is_dataclass(value) and not isinstance(value, type)

    def capture(self, value: Any) -> dict[str, Any]:
        """Return class and fields."""
        name = type(value).__name__
        fields = [field.name for field in dataclasses.fields(value)]
        return {
            "class": class_name(value),
            "fields": {field: self._parts.capture(getattr(value, field), f"{name}.{field}") for field in fields},
        }

    def build(self, tree: Any, allow: Allow) -> Any:
        """Make an instance with the fields."""
        with reading_state(self.name):
            cls = allowed_class(tree["class"], allow)
            if not dataclasses.is_dataclass(cls):
                raise CorruptCheckpointError(
                    f"the preprocessor of the checkpoint is a {tree['class']}, which is no dataclass here",
                    next="use the code of the run that saved",
                )
            value = cls.__new__(cls)
            self._set(value, {name: self._parts.build(field, allow) for name, field in tree["fields"].items()})
            return value

    def is_restorable(self, value: Any) -> bool:
        """Say whether the fields can be set."""
        return not type(value).__dataclass_params__.frozen

    def restore(self, value: Any, tree: Any) -> None:
        """Set the fields of the live instance.

        Raises:
            StateMismatchError: The classes differ, or the instance is frozen.
        """
        if not self.is_restorable(value) or not is_same_class(value, tree["class"]):
            raise StateMismatchError(
                f"a {class_name(value)} cannot become the saved {tree['class']} in place",
                why="it is frozen" if is_same_class(value, tree["class"]) else "the classes differ",
                next="use the preprocessor of the checkpoint: ckptmgr.load_inference(...).preprocessor",
            )

        def allow(name: str) -> Any:
            raise StateMismatchError(
                f"the preprocessor of the checkpoint holds {name}",
                why="nothing is imported because a checkpoint names it",
                next="use the preprocessor of the checkpoint: ckptmgr.load_inference(...).preprocessor",
            )

        with reading_state(self.name):
            self._set(value, {name: self._parts.build(field, allow) for name, field in tree["fields"].items()})

    def encode(self, value: Any, raw: Any) -> Any:
        """Call the instance, or its encode()."""
        return called(value, raw)

    def _set(self, value: Any, fields: dict[str, Any]) -> None:
        known = {field.name for field in dataclasses.fields(value)}
        if fields.keys() != known:
            raise StateMismatchError(
                f"the fields of {class_name(value)} are not those of the checkpoint",
                why=f"only saved: {sorted(fields.keys() - known)}; only now: {sorted(known - fields.keys())}",
                next="use the code of the run that saved",
            )
        for name, field in fields.items():
            # Past the refusal of a frozen class, whose constructor does the same.
            object.__setattr__(value, name, field)
