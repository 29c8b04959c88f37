import shlex

from hypothesis import given, settings
from hypothesis import strategies as st

from halfplate.cli import build_parser
from halfplate.cli.recipe_options import recipe_from
from halfplate.recipe import Recipe
from halfplate.report.command import compress_command

PATTERNS = st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1), max_size=3).map(tuple)


@settings(max_examples=40, deadline=None)
@given(
    model=st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).filter(
        lambda name: name[0] != "-"
    ),
    recipe=st.builds(
        lambda levels, **rest: Recipe(**rest, **levels),
        method=st.sampled_from(["armor", "wanda", "sparsegpt"]),
        samples=st.integers(2, 10**6),
        seq_len=st.integers(2, 10**6),
        seed=st.integers(0, 2**62),
        inputs=st.sampled_from(["dense", "compressed"]),
        cross_damping=st.one_of(st.just("none"), st.floats(0, 1e6)),
        token_limit=st.one_of(st.just("none"), st.floats(1e-6, 1e6)),
        levels=st.one_of(
            st.just({}),
            st.fixed_dictionaries(
                {
                    "budget": st.floats(0.01, 1),
                    "choose": st.sampled_from([("block_size",), ("pattern", "core_dtype")]),
                }
            ),
        ),
        include=PATTERNS,
        exclude=PATTERNS,
        threads=st.one_of(st.none(), st.integers(1, 64)),
        max_kl=st.one_of(st.none(), st.floats(1e-9, 1e9)),
        calibration=st.sampled_from(["self", "my text.txt", "org/name:config", ("my a:b.txt:0.5", "self:0.5")]),
    ),
)
def test_the_command_gives_the_recipe_back(model, recipe):
    words = shlex.split(compress_command(model, "out dir", recipe))
    args = build_parser().parse_args(words[1:])
    assert (args.model, args.out) == (model, "out dir")
    assert recipe_from(args) == recipe


def test_options_of_the_method_are_told():
    recipe = Recipe(
        method_options={"iterations": 7, "objective": "diag"}, block_size=16, core_dtype="int4", share_wrappers=True
    )
    args = build_parser().parse_args(shlex.split(compress_command("M", "OUT", recipe))[1:])
    assert recipe_from(args) == recipe
