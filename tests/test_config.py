from collections.abc import Sequence
from typing import Literal

import pytest
from torch import nn

from vae_lightning.config import (
    ConfigError,
    NonNegative,
    PositiveInt,
    UserError,
    build,
    check_arguments,
    locate,
)


def sample(size: PositiveInt, weight: NonNegative = 1.0, mode: Literal["fast", "slow"] = "fast") -> None: ...


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"size": 0}, ["a.b.size=0", "greater than or equal to 1"]),
        ({"size": "two"}, ["a.b.size=two", "valid integer"]),
        ({"size": True}, ["a.b.size=True", "valid integer"]),
        ({"size": 1.5}, ["a.b.size=1.5", "valid integer"]),
        ({"size": 1, "weight": float("inf")}, ["a.b.weight=inf", "finite"]),
        ({"size": 1, "weight": None}, ["a.b.weight=null"]),
        ({"size": 1, "mode": "fsat"}, ["a.b.mode=fsat", "'fast' or 'slow'", "did you mean fast?"]),
        ({"sise": 1}, ["a.b.sise=1", "did you mean size?", "Allowed: size, weight, mode"]),
        ({}, ["a.b.size: missing"]),
    ],
)
def test_errors_name_the_key_in_one_line(arguments: dict, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        check_arguments(sample, arguments, "a.b")
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_a_word_in_place_of_a_list() -> None:
    def function(metrics: Sequence[str] = ()) -> None: ...

    with pytest.raises(ConfigError, match=r"^metrics=nll: 'str' instances are not allowed as a Sequence value"):
        check_arguments(function, {"metrics": "nll"}, "")


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("os.system", "must be a subclass of torch.nn.modules.module.Module"),
        ("builtins.eval", "must be a subclass"),
        ("vae_lightning.models.backbones.MPL", "did you mean MLP?"),
        ("no_such_package.Thing", "cannot be imported"),
        ("MLP", "a class with its module"),
        (".wide.MLP", "a class with its module"),
    ],
)
def test_build_refuses_other_classes(target: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        build({"_target_": target}, nn.Module, "model.backbone")
    assert f"model.backbone._target_={target}" in str(error.value)


def test_a_class_is_found_where_a_package_imports_it_on_first_use() -> None:
    assert locate("vae_lightning.MLP", nn.Module, "model.backbone").__module__ == "vae_lightning.models.backbones"


class Picky(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        raise ValueError("p has to be\n  between 0 and 1")


def test_value_error_of_a_class_becomes_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^model\.backbone: p has to be between 0 and 1$"):
        build({"_target_": f"{__name__}.Picky", "p": 2.0}, nn.Module, "model.backbone")


class Buggy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.width = {}["width"]


def test_a_bug_of_a_class_keeps_its_traceback() -> None:
    with pytest.raises(KeyError, match="width"):
        build({"_target_": f"{__name__}.Buggy"}, nn.Module, "model.backbone")


def test_build_needs_a_target() -> None:
    with pytest.raises(UserError, match=r"model\._target_: missing"):
        build({"latent_dim": 2}, nn.Module, "model")
