"""Which class of a model is which category of the ground truth."""

from __future__ import annotations

from collections.abc import Sequence

from fusenms.errors import InputError
from fusenms.evaluation.truth import GroundTruth
from fusenms.safety.text import printable


def match_classes(class_names: Sequence[str], truth: GroundTruth) -> tuple[dict[int, int], dict[int, str], str]:
    """Find the category of each class.

    1. Ground truth without names has the class numbers of the model.
    2. By name, if the model has the name of every category. Its other classes have no category.
    3. By order, if there are as many categories, and no name stands at another place on the other side.

    Returns:
        class number to category, category to name, and how they were matched, in words.

    Raises:
        InputError: they match in no way, or an object has a class that the model lacks.
    """
    if truth.categories is None:
        most = max(each.category for each in truth.objects)
        if most >= len(class_names):
            raise InputError(
                f"{printable(truth.source)}: has objects of class {most}, but the model has {len(class_names)} classes, 0 to "
                f"{len(class_names) - 1}: {_listed(class_names)}"
            )
        numbers = range(len(class_names))
        return dict(zip(numbers, numbers, strict=True)), dict(enumerate(class_names)), "by number"
    names = {number: _plain(name) for number, name in truth.categories.items()}
    own = [_plain(name) for name in class_names]
    places = {name: place for place, name in enumerate(own)}
    if len(places) == len(own) and len(set(names.values())) == len(names) and set(names.values()) <= set(places):
        return {places[name]: number for number, name in names.items()}, dict(truth.categories), "by name"
    order = sorted(names)
    elsewhere = [names[number] for place, number in enumerate(order) if places.get(names[number], place) != place]
    if len(order) == len(own) and not elsewhere:
        other = sum(names[number] != own[place] for place, number in enumerate(order))
        return dict(enumerate(order)), dict(truth.categories), f"by order ({other} of {len(own)} names differ)"
    raise InputError(
        f"{printable(truth.source)}: its categories are not the classes of the model; expected the same names, or as many in that order\n"
        f"categories ({len(names)}): {_listed([truth.categories[number] for number in order])}\nmodel ({len(own)}): {_listed(class_names)}"
    )


def _plain(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").split())


def _listed(names: Sequence[str]) -> str:
    return printable(", ".join(names))
