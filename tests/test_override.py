"""Command-line overrides: values, types, and errors a user can act on."""

import dataclasses
from typing import Any, Literal

import pytest

from lintime.model.nets.transformer_vq import TransformerVQConfig
from lintime.train.errors import UserError
from lintime.train.override import apply_overrides, diff, list_fields, matches, nearest
from lintime.train.schema import Optim, Run

pytestmark = pytest.mark.host

RUN = Run(net=TransformerVQConfig())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Net:
    """A net with the kinds of field that the first net does not have."""

    widths: tuple[int, ...] = (1, 2)
    pair: tuple[int, float] = (1, 2.0)
    limit: int | None = None
    mode: Literal["a", "b"] = "a"
    optim: Optim = Optim()


@pytest.mark.parametrize(
    "override, expected",
    [
        ("steps=20", 20),
        ("steps=10_000", 10_000),
        ("steps=1e6", 1_000_000),
        ("steps=1.5e1", 15),
        ("seed=-3", -3),
        ("optim.learning_rate=3e-4", 3e-4),
        ("optim.clip=1", 1.0),
        ("net.cache=false", False),
        ("net.cache=0", False),
        ("net.pe_abs=Yes", True),
        ("net.head_type=mqa", "mqa"),
        ("sample.prompt=a = b ", "a = b "),
        ("init_from=a/b", "a/b"),
    ],
)
def test_values_have_the_annotated_type(override, expected):
    run = apply_overrides(RUN, [override])
    path = override.partition("=")[0]
    (value,) = [v for p, _, v in list_fields(run) if p == path]
    assert value == expected and type(value) is type(expected)
    assert [p for p, _, _ in diff(RUN, run)] == [path]


def test_tuples_options_and_nested_groups():
    run = Run(net=Net())

    def net(*overrides):
        return apply_overrides(run, overrides).net

    assert net("net.widths=3,4,5").widths == (3, 4, 5)
    assert net("net.widths=(7,)").widths == (7,)
    assert net("net.widths=").widths == ()
    assert net("net.pair=[3, 0.5]").pair == (3, 0.5)
    assert net("net.limit=5").limit == 5
    assert net("net.limit=5", "net.limit=none").limit is None
    assert net("net.mode=b").mode == "b"
    assert net("net.optim.warmup=7").optim.warmup == 7
    for bad in ("net.widths=1,x", "net.pair=1", "net.limit=x", "net.mode=c", "net.widths=1,,2"):
        with pytest.raises(UserError, match="expected"):
            net(bad)


def test_later_overrides_win_and_the_original_is_untouched():
    assert apply_overrides(RUN, ["steps=5", "steps=6"]).steps == 6
    assert RUN.steps == Run(net=TransformerVQConfig()).steps
    assert apply_overrides(apply_overrides(RUN, ["init_from=x"]), ["init_from="]) == RUN
    assert hash(apply_overrides(RUN, ["steps=5"])) != hash(RUN)


@pytest.mark.parametrize(
    "override, message",
    [
        (
            "optim.learning_rat=1",
            "unknown field 'optim.learning_rat'; did you mean optim.learning_rate?",
        ),
        ("learning_rate=1", "unknown field 'learning_rate'; did you mean optim.learning_rate?"),
        ("model.d_model=1", "did you mean net.d_model?"),
        ("net.blocklen=1", "did you mean net.block_len?"),
        ("every=1", "did you mean checkpoint.every, eval.every or log.every?"),
        ("steps.x=1", "unknown field 'steps.x'"),
        ("qqqq=1", "unknown field 'qqqq'; see the fields with --help-fields"),
        ("steps=1.5", "steps: expected int, got '1.5'"),
        ("steps=1.0", "steps: expected int, got '1.0'"),
        ("steps=1.55e1", "steps: expected int, got '1.55e1'"),
        ("steps=", "steps: expected int, got ''"),
        ("optim.learning_rate=fast", "optim.learning_rate: expected float, got 'fast'"),
        ("optim.learning_rate=nan", "expected float, got 'nan'"),
        ("net.cache=maybe", "net.cache: expected bool (true or false), got 'maybe'"),
        ("net=mamba", "net is a group of fields and cannot be replaced as a whole"),
        ("steps", "override 'steps' has no '='"),
        ("stages=()", "cannot be given on the command line"),
    ],
)
def test_errors_are_one_line_and_name_the_fix(override, message):
    with pytest.raises(UserError) as caught:
        apply_overrides(RUN, [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_fields_are_listed_with_types_and_values():
    fields = {path: (kind, value) for path, kind, value in list_fields(Run(net=Net()))}
    assert fields["optim.learning_rate"] == ("float", 4e-4)
    assert fields["net.widths"] == ("tuple[int, ...]", (1, 2))
    assert fields["net.limit"] == ("int | None", None)
    assert "net" not in fields and "stages" not in fields
    for path, _, value in list_fields(RUN):  # every listed field can be given back as listed
        assert diff(RUN, apply_overrides(RUN, [f"{path}={value}"])) == []


def test_diff():
    other = apply_overrides(RUN, ["net.d_k=3", "seed=9"])
    assert set(diff(RUN, other)) == {("net.d_k", 128, 3), ("seed", 0, 9)}
    assert diff(RUN, Run(net=Net())) == [("net", "TransformerVQConfig", "Net")]
    one, two = (dataclasses.replace(RUN, stages=(r,)) for r in (RUN, other))
    assert [p for p, _, _ in diff(one, two)] == ["stages.0.net.d_k", "stages.0.seed"]
    assert diff(RUN, one) == [("stages", "0 parts", "1 parts")]


def test_matches_is_exact():
    assert matches(1, float) and matches(1.5, float) and matches((1,), tuple[int, ...])
    assert matches(None, int | None) and matches("x", Any)
    assert not matches(True, int) and not matches(1, bool) and not matches(1.0, int)
    assert not matches([1], tuple[int, ...]) and not matches((1, "a"), tuple[int, ...])
    assert not matches(float("inf"), float) and not matches(True, float)


def test_nearest():
    assert nearest("quickstart", ["a/quickstart", "b/big"], "/") == "; did you mean a/quickstart?"
    assert nearest("zzz", ["a", "b"]) == ""
