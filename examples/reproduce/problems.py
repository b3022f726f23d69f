"""Arithmetic word problems with written-out steps, as prompts and responses.

Sam has 5 apples . buys 7 . eats 4 . how many ?
5 + 7 = 12 ; 12 - 4 = 8 ; # 8
"""

import random
from collections.abc import Set
from dataclasses import dataclass

NAMES = "Ann Ben Eva Ian Kim Leo Mia Sam".split()
THINGS = "apples coins cards pens".split()
VERBS = {"+": "finds buys gets wins".split(), "-": "eats sells loses gives".split()}
LARGEST = 12  # of all numbers, results included: about 150 different additions and subtractions


@dataclass(frozen=True)
class Problem:
    """A prompt and its only right response.

    Attributes:
        prompt: the story, words with spaces between them.
        response: the steps, and the answer after the last "#".
    """

    prompt: str
    response: str


def answer(response: str) -> str | None:
    """What stands after the last "#" of a response, None if there is no such sign."""
    _, sign, after = response.rpartition("#")
    return after.strip() if sign else None


def problems(
    count: int, steps: tuple[int, ...], seed: int, without: Set[str] = frozenset()
) -> list[Problem]:
    """Different problems, a function of the seed.

    Args:
        count: how many.
        steps: numbers of steps, one of which each problem has.
        seed: of all choices.
        without: prompts that are left out.
    """
    random_ = random.Random(seed)
    seen = set(without)
    found: list[Problem] = []
    while len(found) < count:
        problem = _problem(random_, random_.choice(steps))
        if problem.prompt not in seen:
            seen.add(problem.prompt)
            found.append(problem)
    return found


def _problem(random_: random.Random, steps: int) -> Problem:
    value = random_.randint(2, LARGEST)
    story = [f"{random_.choice(NAMES)} has {value} {random_.choice(THINGS)} ."]
    work = []
    for _ in range(steps):
        sign = random_.choice("+-")
        if not 2 <= value <= LARGEST - 2:
            sign = "+" if value < 2 else "-"
        number = random_.randint(1, value if sign == "-" else LARGEST - value)
        result = value + number if sign == "+" else value - number
        story.append(f"{random_.choice(VERBS[sign])} {number} .")
        work.append(f"{value} {sign} {number} = {result} ;")
        value = result
    return Problem(" ".join([*story, "how many ?"]), " ".join([*work, "#", str(value)]))
