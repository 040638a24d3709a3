"""Tests the properties of the demo's rows on which the demo's promises rest."""

import re

from demo.rows import CURT, IS_COURTEOUS, Shop


def shop(seed: int = 0) -> Shop:
    return Shop(num_things=10, num_held_out=20, seed=seed)


def is_courteous(answer: str) -> bool:
    return re.search(IS_COURTEOUS, answer) is not None


def item(text: str) -> str:
    found = re.search(r"\b(?:a|the) (\w+ \w+)", text)
    assert found
    return found[1]


def test_rows_follow_from_the_seed() -> None:
    assert list(shop().pairs(20)) == list(shop().pairs(20))
    assert list(shop(1).pairs(20)) != list(shop().pairs(20))


def test_held_out_items_are_in_no_row() -> None:
    world = shop()
    held_out = {item(prompt) for prompt in world.held_out_prompts()}
    rows = [*world.demonstrations(500), *((prompt, chosen) for prompt, chosen, _ in world.pairs(500))]
    assert len(held_out) == 20
    assert held_out.isdisjoint(item(prompt) for prompt, _ in rows)


def test_about_half_of_the_demonstrations_are_courteous_and_all_are_well_formed() -> None:
    world = shop()
    rows = list(world.demonstrations(1000))
    assert 450 < sum(is_courteous(answer) for _, answer in rows) < 550
    assert all(world.is_well_formed(prompt, answer) for prompt, answer in rows)


def test_a_pair_differs_only_in_its_opening_and_the_courteous_one_is_chosen() -> None:
    for _, chosen, rejected in shop().pairs(100):
        assert is_courteous(chosen)
        assert not is_courteous(rejected)
        assert chosen.split(", ", 1)[1] == rejected.split(", ", 1)[1]


def test_answers_to_another_item_or_with_a_word_too_many_are_not_well_formed() -> None:
    world = shop()
    (prompt, chosen, _), (_, other, _) = list(world.pairs(2))
    assert not world.is_well_formed(prompt, other)
    assert not world.is_well_formed(prompt, f"{chosen} Bye.")
    assert not world.is_well_formed(prompt, chosen.replace("aisle", "hall"))
    assert world.is_well_formed(prompt, CURT[0] + chosen.split(", ", 1)[1])
