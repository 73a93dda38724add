"""Bugs planted in the reading of config.json."""

import importlib.util
from dataclasses import replace

from moe_fn.families import choices, classes, composite, defaults
from moe_fn.families.words import NULL
from planted.bugs import PlantedBug, after, before, instead

_WORD = "a_word_is_read_as_its_class_reads_it"
_OTHER = defaults.CONFIG_CLASSES["hy_v4"].defaults


BUGS = (
    PlantedBug(
        _WORD,
        "what is left out is what another family has",
        classes.words_of_layer,
        before(
            lambda known, *rest: (
                replace(known, defaults={k: _OTHER.get(k, v) for k, v in known.defaults.items()}),
                *rest,
            )
        ),
    ),
    PlantedBug(
        _WORD,
        "null is as if left out",
        classes.words_of_layer,
        before(lambda known, words, layer: (known, {k: v for k, v in words.items() if v is not None}, layer)),
    ),
    PlantedBug(
        _WORD,
        "null is none wherever it stands",
        classes.words_of_layer,
        after(lambda found, *a: {name: None if value is NULL else value for name, value in found.items()}),
    ),
    PlantedBug(
        "a_layer_is_read_with_the_words_of_its_part",
        "nobody looks at the prefix",
        composite.part_of_layer,
        before(lambda words, known, prefix: (words, known, None)),
    ),
    PlantedBug(
        "a_word_that_names_a_function_is_never_read_as_another",
        "names of functions are not looked at",
        choices.check_choices,
        instead(lambda *a: None),
    ),
) * (importlib.util.find_spec("transformers") is not None)
