"""Show or validate a built-in recipe or a recipe file."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action",
        choices=("show", "validate"),
        help="show prints all values, including defaults; validate checks the recipe",
    )
    parser.add_argument(
        "name",
        metavar="NAME",
        help="everyday, smallest-loss, smallest-file, fastest-decode, fast, near-original, quick-look, gguf-q4, gguf-iq4xs, gguf-q4k, gguf-q3k, gguf-q6k, gguf-q8, vllm-w4, mlx-w4, armor, default, or a YAML file",
    )


def run(args: argparse.Namespace) -> int:
    import yaml

    from halfplate.recipe import Recipe

    recipe = Recipe.of() if args.name == "default" else Recipe.from_yaml(args.name)
    if args.action == "show":
        print(yaml.safe_dump(recipe.to_json(), sort_keys=False), end="")
    else:
        print(f"{args.name}: a valid recipe")
    return 0
