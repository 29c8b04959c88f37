import json
from typing import get_type_hints

import pytest

from halfplate.errors import HalfplateError
from halfplate.formats.quantizers import QUANTIZERS
from halfplate.recipe import Recipe, RecipeFields


def test_json_round_trip():
    recipe = Recipe(method="wanda", include=("*.q_proj",), threads=1)
    assert Recipe.from_mapping(json.loads(json.dumps(recipe.to_json()))) == recipe


def test_text_from_flags_gets_the_type_of_the_field():
    recipe = Recipe(method="wanda", samples="3", max_kl="0.5", block_size="0", threads="2")  # type: ignore[arg-type]
    assert (recipe.samples, recipe.max_kl, recipe.block_size, recipe.threads) == (3, 0.5, 0, 2)


def test_method_options_get_the_type_of_the_method():
    recipe = Recipe(method="sparsegpt", method_options={"damping": "0.1"})
    assert recipe.method_options == {"damping": 0.1}
    assert recipe.create_method().damping == 0.1  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"version": 2}, "version=2"),
        ({"method": "wnda"}, "did you mean 'wanda'"),
        ({"samples": "many"}, "samples='many' is not of the right type; expected a whole number"),
        ({"samples": 0}, "samples=0 is out of range; expected at least 1"),
        ({"samples": True}, "samples=True"),
        ({"seq_len": 1}, "seq_len=1"),
        ({"seed": -1}, "seed=-1"),
        ({"threads": 0}, "threads=0"),
        ({"pattern": "2-4"}, "pattern='2-4' is not of the form N:M"),
        ({"pattern": "4:4"}, "pattern=4:4"),
        ({"pattern": "dense"}, "pattern='dense' is not supported by method 'wanda'; use pattern 2:4"),
        ({"pattern": "2:4", "method": "rtn"}, "pattern='2:4' is not supported by method 'rtn'"),
        (
            {"method": "rtn"},
            "core_dtype='bf16' is not a quantised type, and method 'rtn' only quantises; use int8",
        ),
        ({"method": "rtn", "core_dtype": "int4", "block_size": 16}, "'rtn' has none"),
        ({"block_size": 16}, "needs a method with wrappers, and 'wanda' has none"),
        ({"block_size": -1}, "block_size=-1"),
        ({"block_size": "big"}, "block_size='big' is not of the right type; expected a whole number or auto"),
        (
            {"core_dtype": "int7"},
            f"core_dtype='int7' is not one of fp32, bf16, fp16, {', '.join(QUANTIZERS)}",
        ),
        ({"wrapper_dtype": "int4"}, "wrapper_dtype='int4' is not one of fp32, bf16, fp16, int8"),
        ({"inputs": "compresed"}, "inputs='compresed' is not one of dense, compressed"),
        ({"cross_damping": -1}, "cross_damping=-1.0 must be a finite number, 0 or more, or none"),
        ({"cross_damping": "some"}, "cross_damping='some' is not of the right type"),
        ({"include": "*.q_proj"}, "include='*.q_proj' is not of the right type; expected a list of texts"),
        ({"device": "gpu"}, "device='gpu'"),
        ({"max_kl": 0}, "max_kl=0.0"),
        ({"calibration": ""}, "calibration=''"),
        ({"method_options": {"iterations": 3}}, "iterations=3 is not an option of method 'wanda'"),
        ({"method_options": 3}, "method_options=3"),
        ({"metod": "wanda"}, "key 'metod' is unknown; did you mean 'method'?"),
    ],
)
def test_wrong_values_are_named_with_their_cure(values, message):
    with pytest.raises(HalfplateError) as caught:
        Recipe.from_mapping({"method": "wanda"} | values)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("method", "core_dtype", "pattern"), [("wanda", "int8", "2:4"), ("rtn", "int4", "dense")])
def test_the_pattern_is_that_of_the_method_unless_it_is_given(method, core_dtype, pattern):
    recipe = Recipe(method=method, core_dtype=core_dtype)
    assert recipe.pattern == recipe.to_json()["pattern"] == pattern
    assert recipe == Recipe(method=method, core_dtype=core_dtype, pattern=pattern)
    assert Recipe.from_mapping(recipe.to_json()) == recipe


def test_yaml_and_changes(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("method: sparsegpt\nmethod_options:\n  damping: 1e-1\nsamples: 8\nexclude: ['*.q_proj']\n")
    recipe = Recipe.from_yaml(path)
    assert recipe.method_options == {"damping": 0.1}
    assert recipe.exclude == ("*.q_proj",)
    assert Recipe.from_yaml(path, samples=4).samples == 4
    assert Recipe.from_yaml(path, method_options={"damping": 0.2}).method_options == {"damping": 0.2}
    # Options belong to a method: another one does not inherit them.
    assert Recipe.from_yaml(path, method="wanda").method_options == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- 1\n", "expected a mapping"),
        ("a: [\n", "not valid YAML"),
        ("samples: x\n", "samples='x'"),
        ("smples: 1\n", "did you mean 'samples'"),
    ],
)
def test_wrong_yaml(tmp_path, content, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(HalfplateError, match=message):
        Recipe.from_yaml(path, method="wanda")


def test_missing_yaml(tmp_path):
    with pytest.raises(HalfplateError, match="cannot be read"):
        Recipe.from_yaml(tmp_path / "none.yaml")


def test_empty_yaml_is_the_default(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("")
    assert Recipe.from_yaml(path, method="wanda") == Recipe(method="wanda")


def test_threads_and_max_kl_leave_the_fingerprint_alone():
    assert Recipe(method="wanda", threads=1, max_kl=1.0).fingerprint_json() == Recipe(method="wanda").fingerprint_json()
    assert Recipe(method="wanda", seed=1).fingerprint_json() != Recipe(method="wanda").fingerprint_json()


def test_keyword_arguments_of_verbs_are_the_fields_of_the_recipe():
    hints = {name: hint for name, hint in get_type_hints(Recipe).items() if name != "version"}
    assert get_type_hints(RecipeFields) == hints


def test_a_recipe_of_whatever_is_at_hand(tmp_path):
    (tmp_path / "r.yaml").write_text("method: wanda\nsamples: 8\n")
    assert Recipe.of() == Recipe.from_yaml("everyday")
    assert Recipe.of(seed=3) == Recipe.from_yaml("everyday", seed=3)
    assert Recipe.of(Recipe(seed=3), samples=8) == Recipe(seed=3, samples=8)
    assert Recipe.of(tmp_path / "r.yaml", samples=9) == Recipe(method="wanda", samples=9)
    with pytest.raises(HalfplateError, match="option='sample' is unknown; did you mean 'samples'"):
        Recipe.of(sample=3)


EVERYDAY = {"pattern": "dense", "core_dtype": "nl4", "block_size": 0, "embedding_dtype": "auto", "head_dtype": "auto"}


@pytest.mark.parametrize(
    "changes", [{}, {"samples": 8}, {"method_options": {"iterations": 2}}, {"tune_block": 4}], ids=str
)
def test_who_chooses_no_format_gets_the_everyday_recipe(changes):
    recipe = Recipe.of(**changes)
    assert {name: getattr(recipe, name) for name in EVERYDAY} == EVERYDAY


@pytest.mark.parametrize(
    "changes",
    [
        {"pattern": "2:4"},
        {"method": "wanda"},
        {"core_dtype": "int8"},
        {"block_size": 8},
        {"time_budget": 0.5},
        {"budget": 0.5, "choose": ["pattern"]},
        {"method_options": {"objective": "diag"}},
    ],
    ids=str,
)
def test_who_chooses_a_part_of_the_format_gets_none_of_it(changes):
    assert Recipe.of(**changes) == Recipe(**changes)


def test_a_budget_alone_varies_the_bits_of_the_everyday_recipe():
    recipe = Recipe.of(budget=0.4)
    assert (recipe.choose, recipe.pattern, recipe.block_size) == (("core_dtype",), "dense", 0)
    assert (recipe.embedding_dtype, recipe.head_dtype) == ("auto", "auto")


def test_a_recipe_of_its_own_is_not_laid_over_the_everyday_one():
    assert Recipe.of(Recipe(samples=3), seq_len=5) == Recipe(samples=3, seq_len=5)


def test_an_effort_sets_what_the_recipe_leaves_open():
    assert [Recipe(effort=word).samples for word in ("quick", "normal", "best")] == [32, 64, 128]
    assert Recipe(effort="quick", samples=8).samples == 8
    assert Recipe.from_mapping({"effort": "best"}).samples == 128
    quick, own = Recipe(effort="quick").create_method(), Recipe(effort="quick", method_options={"iterations": 3})
    assert (quick.iterations, quick.grid_iterations) == (8, 8)  # type: ignore[attr-defined]
    assert own.create_method().iterations == 3  # type: ignore[attr-defined]
    diagonal = Recipe(effort="best", method_options={"objective": "diag"}).create_method()
    assert (
        diagonal == Recipe(method_options={"objective": "diag"}).create_method()
    )  # it has 60 iterations, and best has 40
    assert Recipe(effort="quick", method="wanda").create_method() == Recipe(method="wanda").create_method()


def test_an_effort_that_is_not_known_names_the_others():
    with pytest.raises(HalfplateError, match=r"effort='some' is not one of quick, normal, best"):
        Recipe(effort="some")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("choose", "message"),
    [
        (["core_dtype=nl4+nl7"], "choose=core_dtype='nl7'"),
        (["group_size=32+33"], "choose=group_size='33'"),
        (["block_size=some"], "choose=block_size='some' is not a block size; try choose=block_size=0\\+16"),
        (["pattern=2:4+x"], "x"),
        (["core=nl4"], "choose='core' is not one of"),
    ],
)
def test_values_that_a_field_cannot_have_are_refused(choose, message):
    with pytest.raises(HalfplateError, match=message):
        Recipe(pattern="dense", core_dtype="nl4", budget=0.5, choose=choose)


def test_types_of_matrices_by_their_names():
    types = ["*.down_proj=nl5", "*.0.*=int8:32", "*.0.up_proj=nl3"]
    recipe = Recipe(pattern="dense", core_dtype="nl4", types=types, group_size=64)  # type: ignore[arg-type]
    found = [recipe.core_of(f"layers.{name}") for name in ("1.up_proj", "0.down_proj", "0.up_proj")]
    assert found == [("nl4", 64), ("nl5", 64), ("int8", 32)]  # the first that matches counts
    assert Recipe.from_mapping(recipe.to_json()) == recipe


def test_one_type_replaces_those_of_a_recipe():
    assert Recipe.from_yaml("everyday").types
    assert Recipe.from_yaml("everyday", core_dtype="int4").types == ()
    assert Recipe.from_yaml("everyday", core_dtype="int4", types=("*.q_proj=int8",)).types == ("*.q_proj=int8",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"types": ["nl5"]}, "types='nl5' is not of the form PATTERN=TYPE or PATTERN=TYPE:COLUMNS; try"),
        ({"types": ["*.down_proj=nl7"]}, "nl7"),
        ({"types": ["*=int6k:"]}, "types='\\*=int6k:' is not of the form PATTERN=TYPE or PATTERN=TYPE:COLUMNS; try"),
        ({"types": ["*=int6k:17"]}, "17"),
        ({"types": ["*.down_proj=bf16"]}, "bf16"),
        ({"types": ["*=nl5"], "share_wrappers": True, "block_size": 16}, "matrices that share a wrapper have one type"),
    ],
)
def test_types_that_no_core_can_have_are_refused(changes, message):
    with pytest.raises(HalfplateError, match=message):
        Recipe(**({"pattern": "dense", "core_dtype": "nl4"} | changes))
