"Recipes: what is refused, what the name depends on, and that the words are those of the registries"
import json
import subprocess
import sys
from dataclasses import asdict, replace

import pytest

from sumix_nb.data.files import VIEWS
from sumix_nb.data.loaders import STATS
from sumix_nb.data.sources import SOURCES
from sumix_nb.models.networks import MODELS
from sumix_nb.labels import RULES
from sumix_nb.sumix.adautomix import LEARNED
from sumix_nb.sumix.callback import CLEAN
from sumix_nb.sumix.ratio import VARIANTS
from sumix_nb.training.recipe import CHOICES, RANGES, WHOLE, Recipe
from sumix_nb.mixers.choosing import MIXERS


@pytest.mark.parametrize(("field", "value"), [
    *((field, "cutmx") for field in CHOICES), *((field, value) for field in WHOLE for value in (0, 10**9)),
    ("lr", 0.0), ("lr", float("nan")), ("alpha", -1.0), ("clip", -1.0), ("smoothing", 1.5), ("ema", -0.1),
    ("p", 2.0), ("xi", -1.0), ("off_after", 1.1), ("warmup", 3.0), ("min_lr", 1.0), ("seed", 2**70),
    ("seed", -1), ("valid", "tset"), ("valid", 1.0), ("limit", 0), ("limit", (5, 0)), ("limit", (1, 2, 3))])
def test_a_value_that_cannot_be_run_is_named(field, value):
    with pytest.raises(ValueError, match=f"`{field}` must"): Recipe(**{field: value})


@pytest.mark.parametrize(("field", "value"), [
    ("valid", True), ("valid", None), ("limit", "60"), ("limit", True), ("limit", (None, "all")), ("seed", 1.0),
    ("mixer_options", [1]), ("validate_every", 2.5), *((field, "1") for field in (*RANGES, *WHOLE)),
    *((field, value) for field, kind in asdict(Recipe()).items() if isinstance(kind, bool) for value in (1, "yes"))])
def test_a_value_of_another_type_is_named(field, value):
    with pytest.raises(TypeError, match=f"`{field}` must"): Recipe(**{field: value})


@pytest.mark.parametrize(("field", "value"), [
    ("method", "mce_bn"), ("method", "mce_clean"), ("per_sample", True), ("p", 0.5), ("off_after", 0.5), ("ema", 0.9),
    ("clean", "concat"), ("update_bn", False), ("z", "features"), ("relabel", False), ("label_rule", "half")])
def test_a_mixer_that_learns_refuses_what_it_has_no_use_for(field, value):
    for mixer in LEARNED:
        with pytest.raises(ValueError, match=f"`{field}` must be .* learns .{mixer}.*got {value!r}"):
            Recipe(mixer=mixer, **{field: value})


def test_the_name_depends_on_every_field():
    base = Recipe(width=4, mixer="cutmix", schedule="cosine_step", lr=0.9)
    changed = {"mixer_options": {"a": 1}, "limit": 77, "valid": 0.3, "size": 48}
    changed |= {name: next(word for word in words if word not in (getattr(base, name), "none"))
                for name, words in CHOICES.items()}
    others = {bool: lambda value: not value, int: lambda value: 77, float: lambda value: 0.77}
    changed |= {name: others[type(value)](value) for name, value in asdict(base).items() if name not in changed}
    names = {replace(base, **{name: value}).name for name, value in changed.items()}
    assert changed.keys() == asdict(base).keys() and len(names | {base.name}) == len(changed) + 1


def test_the_name_is_known_and_a_default_is_not_in_it():
    "Written down once: a name that changes is a record that is lost"
    assert Recipe().name == "digits-resnet18-none-mce-e10-s0-44136fa3"  # SHA-256 of "{}"
    assert Recipe(epochs=10, off_after=1, validate_every=1, limit=None).name == Recipe().name
    assert Recipe(limit=(5000, None)).name == Recipe(limit=[5000, None]).name != Recipe(limit=5000).name


def test_a_recipe_survives_json():
    for recipe in (Recipe(), Recipe(limit=(5000, None), off_after=1, lr=1), Recipe(limit=(7, 7), valid=0.5)):
        again = Recipe(**json.loads(json.dumps(asdict(recipe))))
        assert again == recipe and again.name == recipe.name and isinstance(again.lr, float)
    assert Recipe(limit=(7, 7)).limit == 7 and Recipe(limit=(None, None)) == Recipe()


def test_the_words_are_those_of_the_registries():
    registries = {"data": SOURCES, "view": (None, "crop", *VIEWS), "stats": (None, *STATS), "model": MODELS,
                  "mixer": ("none", *MIXERS, *LEARNED), "variant": VARIANTS, "clean": CLEAN,
                  "label_rule": RULES}
    for name, registry in registries.items(): assert set(CHOICES[name]) == set(registry), name


def test_a_recipe_needs_no_fastai():
    code = ("import sys, sumix_nb.training.recipe as r; r.Recipe().name; "
            "print([m for m in sys.modules if m.split('.')[0] in ('fastai', 'torchvision', 'pandas')])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_label_rule_needs_what_it_labels_and_defaults_keep_their_names():
    assert Recipe().name == "digits-resnet18-none-mce-e10-s0-44136fa3"
    assert Recipe(mixer="cutmix", label_rule="half").name != Recipe(mixer="cutmix").name
    for wrong in ({}, {"mixer": "cutmix", "method": "sumix"}):
        with pytest.raises(ValueError, match='`label_rule` must be "area" unless'): Recipe(label_rule="half", **wrong)
    with pytest.raises(ValueError, match="`label_rule` 'oracle' needs object masks"):
        Recipe(mixer="cutmix", label_rule="oracle")
    assert Recipe(mixer="cutmix", label_rule="oracle", data="hard_scenes").label_rule == "oracle"
