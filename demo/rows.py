"""Makes the demo's rows: dialogues in a hardware shop, whose assistants are courteous or curt.

Customers prefer courteous assistants. The rows depend only on the seed. An answer is well-formed if it names the item
that the customer asks for, and the item's aisle. An answer is courteous if its first word is courteous.
"""

import random
import re
from collections.abc import Iterator
from itertools import product

# fmt: off
COLORS = (
    "black", "white", "red", "blue", "green", "yellow", "brown", "grey", "orange", "purple", "silver", "golden",
)
THINGS = (
    "hammer", "saw", "drill", "wrench", "ladder", "bucket", "brush", "rope", "chain", "bolt",
    "nail", "screw", "hinge", "lamp", "candle", "shovel", "rake", "hose", "basket", "mirror",
    "shelf", "stool", "table", "chair", "carpet", "curtain", "kettle", "broom", "mop", "clock",
)
# fmt: on
QUESTIONS = (
    "Where do I find a {item}?",
    "Do you have a {item}?",
    "I am looking for a {item}.",
    "Could you show me a {item}?",
    "I need a {item} today.",
    "Is there a {item} in this shop?",
)
ANSWERS = ("the {item} is in aisle {aisle}.", "you will find the {item} in aisle {aisle}.")
COURTEOUS = ("Certainly, ", "Gladly, ", "Welcome, ")
IS_COURTEOUS = f"^({'|'.join(COURTEOUS)})"
CURT = ("Well, ", "Look, ", "Listen, ")

Item = tuple[str, str]  # colour, thing


class Shop:
    """Makes rows and prompts about the items of a shop, from a seed. Items of held-out prompts occur in no row."""

    def __init__(self, *, num_things: int, num_held_out: int, seed: int = 0) -> None:
        self._random = random.Random(seed)
        self._aisles = {thing: self._random.randint(1, 9) for thing in THINGS[:num_things]}
        items = list(product(COLORS, self._aisles))
        self._random.shuffle(items)
        # Rows have the colour and the thing of a held-out item, but in combination with other things and colours.
        self._held_out, self._known = items[:num_held_out], items[num_held_out:]

    def demonstrations(self, count: int) -> Iterator[tuple[str, str]]:
        """Yields `count` prompts, each with an answer that is at random curt or courteous."""
        for _ in range(count):
            item = self._random.choice(self._known)
            yield self._ask(item), self._random.choice(COURTEOUS + CURT) + self._answer(item)

    def pairs(self, count: int) -> Iterator[tuple[str, str, str]]:
        """Yields `count` prompts, each with a courteous answer (chosen) and the same answer put curtly (rejected)."""
        for _ in range(count):
            item = self._random.choice(self._known)
            answer = self._answer(item)
            chosen, rejected = self._random.choice(COURTEOUS), self._random.choice(CURT)
            yield self._ask(item), chosen + answer, rejected + answer

    def held_out_prompts(self) -> list[str]:
        return [self._ask(item) for item in self._held_out]

    def is_well_formed(self, prompt: str, answer: str) -> bool:
        """Whether the answer names the prompt's item and the item's aisle in one of the phrasings of this shop."""
        item = re.search(r"\ba (\w+) (\w+)", prompt)
        assert item, prompt
        possible = product(COURTEOUS + CURT, self._answers((item[1], item[2])))
        return answer in {opening + plain for opening, plain in possible}

    def _ask(self, item: Item) -> str:
        return self._random.choice(QUESTIONS).format(item=" ".join(item))

    def _answer(self, item: Item) -> str:
        return self._random.choice(self._answers(item))

    def _answers(self, item: Item) -> list[str]:
        return [answer.format(item=" ".join(item), aisle=self._aisles[item[1]]) for answer in ANSWERS]
