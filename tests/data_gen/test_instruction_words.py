# SPDX-License-Identifier: Apache-2.0
"""Claim: the rule of thumb finds verb and object of plain English instructions."""

import pytest

from data_gen.instruction_words import verb_and_object


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("make it winter", ("make", "winter")),
        ("Turn the old red car into a train.", ("turn", "car")),
        ("make it look like a painting by Monet", ("make", "painting")),
        ("please add a hot-air balloon", ("add", "balloon")),
        ("have the dog wear a hat", ("have", "wear")),  # only a rule of thumb
        ("put it on the moon", ("put", "moon")),
        ("Let's swap the chef’s hat for a crown", ("swap", "hat")),
        ("vieillir", ("vieillir", "")),
        ("把猫变成狗", ("把猫变成狗", "")),
        ("1 + 1!", ("", "")),
        ("please", ("", "")),
    ],
)
def test_verb_and_object(instruction, expected):
    assert verb_and_object(instruction) == expected
