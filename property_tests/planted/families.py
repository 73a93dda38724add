"""Planted bugs of config_of_layer."""

import importlib.util
from dataclasses import replace

from moe_fn.families import build, config_class, find
from moe_fn.families.keys import NULL
from planted.bugs import PlantedBug, after, before, instead

_KEY = "a_key_is_read_as_its_class_reads_it"
_OTHER = find.CONFIG_CLASSES["hy_v4"].defaults


BUGS = (
    PlantedBug(
        _KEY,
        "a missing key has the default of another family",
        config_class.values_of_layer,
        before(
            lambda known, *rest: (
                replace(known, defaults={k: _OTHER.get(k, v) for k, v in known.defaults.items()}),
                *rest,
            )
        ),
    ),
    PlantedBug(
        _KEY,
        "null is read as missing",
        config_class.values_of_layer,
        before(lambda known, values, layer: (known, {k: v for k, v in values.items() if v is not None}, layer)),
    ),
    PlantedBug(
        _KEY,
        "null is None for every key",
        config_class.values_of_layer,
        after(lambda found, *a: {name: None if value is NULL else value for name, value in found.items()}),
    ),
    PlantedBug(
        "a_layer_is_read_with_the_values_of_its_part",
        "the prefix is ignored",
        find.part_of_layer,
        before(lambda values, prefix: (values, None)),
    ),
    PlantedBug(
        "a_key_that_names_a_function_is_never_read_as_another",
        "names of functions are not checked",
        build.check_choices,
        instead(lambda *a: None),
    ),
) * (importlib.util.find_spec("transformers") is not None)
