"""Makes the demo's rows: dialogues in a hardware shop. Its assistants are curt or courteous; customers prefer courtesy.

Everything follows from the seed. Rules check an answer: it is well-formed if it names the wanted item and the right
aisle, and courteous by its first word.
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
CURT = ("Well, ", "Look, ", "Listen, ")

Item = tuple[str, str]  # colour, thing


class Shop:
    """A shop made from a seed. The items of the held-out prompts appear in no row."""

    def __init__(self, *, num_things: int, num_held_out: int, seed: int = 0) -> None:
        self._random = random.Random(seed)
        self._aisles = {thing: self._random.randint(1, 9) for thing in THINGS[:num_things]}
        items = list(product(COLORS, self._aisles))
        self._random.shuffle(items)
        # Colour and thing are each known from other items; only their combination is new.
        self._held_out, self._known = items[:num_held_out], items[num_held_out:]

    def demonstrations(self, count: int) -> Iterator[tuple[str, str]]:
        """Yields prompts, each with an answer that is curt or courteous at random."""
        for _ in range(count):
            item = self._random.choice(self._known)
            yield self._ask(item), self._random.choice(COURTEOUS + CURT) + self._answer(item)

    def pairs(self, count: int) -> Iterator[tuple[str, str, str]]:
        """Yields prompts with the same answer twice: courteous as the chosen one, and curt as the rejected one."""
        for _ in range(count):
            item = self._random.choice(self._known)
            answer = self._answer(item)
            chosen, rejected = self._random.choice(COURTEOUS), self._random.choice(CURT)
            yield self._ask(item), chosen + answer, rejected + answer

    def held_out_prompts(self) -> list[str]:
        return [self._ask(item) for item in self._held_out]

    def is_well_formed(self, prompt: str, answer: str) -> bool:
        """Whether an assistant of this shop could give this answer to this prompt."""
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


def is_courteous(answer: str) -> bool:
    return answer.startswith(COURTEOUS)
