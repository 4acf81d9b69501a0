"""Build objects from plain configuration, and report each error in one line.

A configuration is a nested dictionary of numbers, strings and lists. A dictionary with a `_target_` names a class. Its
other keys are the constructor's arguments, and the constructor's type hints say which values are allowed:

    spec = {"_target_": "vae_lightning.models.backbones.MLP", "hidden": [400]}
    build(spec, Backbone, "model.backbone", latent_dim=20, encoder_outputs=40, image_shape=(1, 28, 28))

In Python, a class or `functools.partial(MLP, hidden=[400])` takes the place of such a dictionary. This module does not
need Hydra, so a trained model loads without it.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, TypeVar, get_type_hints

from pydantic import ConfigDict, Field, SkipValidation, TypeAdapter, ValidationError

T = TypeVar("T")
R = TypeVar("R")

# Type hints for numbers in a configuration: finite, and never converted from a bool or a string.
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveInt = Annotated[int, Field(ge=1, lt=2**63)]  # PyTorch's integers
NonNegativeInt = Annotated[int, Field(ge=0, lt=2**63)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]  # accepted by every library's generator
ImageShape = Annotated[Sequence[PositiveInt], Field(min_length=3, max_length=3)]  # channels, height, width
Spec = dict[str, Any]  # {"_target_": class, argument: value, ...}
Part = Annotated[Spec | type[Any] | partial[Any], SkipValidation]  # `build` checks it


class UserError(Exception):
    """An error that the user can fix; its text is one line, shown without a traceback."""


class ConfigError(UserError):
    """A wrong key, choice, type or value in the configuration."""


def did_you_mean(given: object, allowed: Iterable[object]) -> str:
    """Return `"; did you mean X?"` with the closest match in `allowed`, or `"."` if there is none."""
    close = difflib.get_close_matches(str(given), [str(a) for a in allowed], n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else "."


def check_arguments(
    function: Callable[..., Any], arguments: Mapping[str, Any], path: str, given: Iterable[str] = ()
) -> None:
    """Check `arguments` against the signature and type hints of `function`.

    `path` is their key in the configuration (`"model.backbone"`); error messages begin with it. `given` names the
    arguments that the caller passes itself.
    Raises ConfigError for the first unknown key, missing key, wrong type or value out of range.
    """
    parameters = inspect.signature(function).parameters
    allowed = [name for name in parameters if name not in given]
    try:
        hints = get_type_hints(function.__init__ if inspect.isclass(function) else function, include_extras=True)
    except NameError:  # a hint whose class is imported for type checkers only cannot be checked
        hints = {}
    prefix = f"{path}." if path else ""
    takes_any_key = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name, value in arguments.items():
        if name in allowed:
            default = parameters[name].default
            if name in hints and (type(value), value) != (type(default), default):
                check_value(hints[name], value, prefix + name)
        elif not takes_any_key:
            near = did_you_mean(name, allowed)
            raise ConfigError(f"{prefix}{name}={value}: no such key{near} Allowed: {', '.join(allowed)}")
    for name, parameter in parameters.items():
        needed = parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        if needed and name not in {*arguments, *given}:
            raise ConfigError(f"{prefix}{name}: missing, and it has no default")


def build(part: object, kind: type[T], path: str, **given: Any) -> T:
    """Build the object that `part` describes: call its class with its arguments and with `given`.

    The class must be a subclass of `kind`, so a configuration cannot name functions such as `os.system`.
    Raises ConfigError, which names the key under `path`, if the class or an argument does not fit.
    """
    named, arguments = class_and_arguments(part, path)
    target = locate(named, kind, f"{path}._target_")
    check_arguments(target, arguments, path, given)
    try:
        return target(**{**arguments, **given})
    except ValueError as error:  # the class rejected its arguments, with a message
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error


def as_spec(part: object, path: str) -> Spec:
    """Return `part` as a spec, which a checkpoint can store. Raises ConfigError, which names `path`."""
    named, arguments = class_and_arguments(part, path)
    name = f"{named.__module__}.{named.__qualname__}" if isinstance(named, type) else named
    return {"_target_": name, **arguments}


def class_and_arguments(part: object, path: str) -> tuple[str | type, dict[str, Any]]:
    """Return the class of a part, or its name, and the arguments. Raises ConfigError, which names `path`."""
    if isinstance(part, type):
        return part, {}
    if isinstance(part, partial) and isinstance(part.func, type) and not part.args:
        return part.func, part.keywords
    if not isinstance(part, Mapping):
        given = " ".join(str(part).split())[:100]
        allowed = "a class, functools.partial(class, argument=value), or {_target_: class, argument: value}"
        raise ConfigError(f"{path}={given}: should be {allowed}")
    if "_target_" not in part:
        raise ConfigError(f"{path}._target_: missing; it should name the class to build")
    return part["_target_"], {key: value for key, value in part.items() if key != "_target_"}


def takes_options_of(*functions: Callable[..., Any]) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """Decorate a function with `**options`: its signature lists the keyword-only parameters of `functions` instead."""

    def decorate(wrapper: Callable[..., R]) -> Callable[..., R]:
        own, *others = (inspect.signature(f, eval_str=True).parameters.values() for f in (wrapper, *functions))
        parameters = [p for p in own if p.kind is not p.VAR_KEYWORD]
        parameters += [p for other in others for p in other if p.kind is p.KEYWORD_ONLY]
        wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
        return wrapper

    return decorate


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dictionaries into one with dotted keys; lists and empty dictionaries are values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def locate(name: object, kind: type[T], key: str) -> type[T]:
    """Return the class with that dotted name, or the class `name` itself.

    Raises ConfigError, which names `key`, if it cannot be imported, or is not a subclass of `kind`.
    """
    target, near = name, "."
    if not isinstance(name, type):
        place, _, class_name = str(name).rpartition(".")
        if "" in place.split("."):
            raise ConfigError(f"{key}={name}: should be a class with its module, package.module.Class")
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError as error:
            if not f"{place}.".startswith(f"{error.name}."):
                raise  # the module exists, and imports another one that does not
            raise ConfigError(f"{key}={name}: cannot be imported ({error})") from error
        fitting = [word for word, value in vars(module).items() if isinstance(value, type) and issubclass(value, kind)]
        target, near = getattr(module, class_name, None), did_you_mean(class_name, fitting)
    if not (isinstance(target, type) and issubclass(target, kind)):
        given = getattr(name, "__name__", name)
        raise ConfigError(f"{key}={given}: must be a subclass of {kind.__module__}.{kind.__name__}{near}")
    return target


def check_value(hint: Any, value: Any, key: str) -> None:
    """Raise ConfigError, which names `key`, if the value does not fit the type hint."""
    adapter: TypeAdapter[Any] = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    if isinstance(value, list) and "tuple[" in str(hint):  # YAML has no tuples
        value = tuple(value)
    try:
        adapter.validate_python(value, strict=True)
    except ValidationError as invalid:
        # There is an error for each member of a union and each element of a list: repeat no message.
        messages = dict.fromkeys(error["msg"].replace("Input should", "should") for error in invalid.errors())
        wanted = " or ".join(messages)
        near = did_you_mean(value, re.findall("'(.+?)'", wanted))  # the choices of a Literal stand in quotes
        raise ConfigError(f"{key}={'null' if value is None else str(value)[:200]}: {wanted}{near}") from None
