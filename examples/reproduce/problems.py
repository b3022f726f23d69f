"""Generates problems of graded difficulty, as prompts and responses: arithmetic stories and tables.

Sam has 5 apples . buys 7 . eats 4 . ?
5 + 7 = 12 - 4 = 8

Ann pens ax 7 cups ay 31 . Sam pens bx 4 cups by 9 . cups ?
ay 31 + by 9 = 40                        (or ... . y ?)

The answer is the last number. No two steps of a story have the same result. The answer can equal
another number of the response, as it does in 20% of stories and 28% of tables.
"""

from collections.abc import Callable, Set
from dataclasses import dataclass
from random import Random

NAMES = "Ann Ben Eva Ian Kim Leo Mia Sam".split()
THINGS = "apples coins cups pens".split()
VERBS = {"+": "buys finds gets wins".split(), "-": "eats gives loses sells".split()}
# Upper limits of the numbers in a problem, including results. Each limit is drawn equally often, so
# that a given sum of large numbers is rarer than one of small numbers, and learning takes long.
SIZES = (6, 12, 24, 48)
CELLS = [row + column for row in "abc" for column in "xy"]  # coordinates in a table


@dataclass(frozen=True)
class Problem:
    """A prompt and its only right response.

    Attributes:
        prompt: words, separated by spaces.
        response: the steps; the answer is the last word.
    """

    prompt: str
    response: str


def answer(response: str) -> str | None:
    """Returns the last word of a response if it is a number, else None."""
    last = response.rpartition(" ")[2]
    return last if last.isdigit() else None


def distinct(
    make: Callable[[Random], Problem], count: int, seed: int, without: Set[str] = frozenset()
) -> list[Problem]:
    """Makes problems with different prompts, as a function of the seed.

    Args:
        make: makes a problem.
        count: number of problems.
        seed: seed of all choices.
        without: prompts that are left out.
    """
    random_ = Random(seed)
    seen = set(without)
    found: list[Problem] = []
    while len(found) < count:
        problem = make(random_)
        if problem.prompt not in seen:
            seen.add(problem.prompt)
            found.append(problem)
    return found


def story(random_: Random, steps: tuple[int, ...] = (1, 2, 3)) -> Problem:
    """Makes a story: somebody gets and loses things, and no two steps have the same result."""
    largest = random_.choice(SIZES)
    value = random_.randint(1, largest)
    told = [f"{random_.choice(NAMES)} has {value} {random_.choice(THINGS)} ."]
    work, results = [str(value)], []
    for _ in range(random_.choice(steps)):
        sign = random_.choice("+-")
        if not 1 <= value < largest:
            sign = "+" if value < 1 else "-"
        number = random_.randint(1, value if sign == "-" else largest - value)
        value = value + number if sign == "+" else value - number
        told.append(f"{random_.choice(VERBS[sign])} {number} .")
        work.append(f"{sign} {number} = {value}")
        results.append(value)
    if len(set(results)) < len(results):
        return story(random_, steps)
    return Problem(" ".join([*told, "?"]), " ".join(work))


def table(random_: Random) -> Problem:
    """Makes a table; asks for a column's sum by its coordinate or, which is harder, by its name."""
    largest = random_.choice(SIZES)
    names, things = random_.sample(NAMES, random_.choice((2, 3))), random_.sample(THINGS, 2)
    columns = []
    for _ in things:
        left, column = largest, []
        for _ in names:
            column.append(random_.randint(0, left))
            left -= column[-1]
        columns.append(random_.sample(column, len(column)))
    lines = [
        " ".join([name, *(f"{things[j]} {cell(i, j)} {columns[j][i]}" for j in range(2))])
        for i, name in enumerate(names)
    ]
    asked = random_.randrange(2)
    work, total = f"{cell(0, asked)} {columns[asked][0]}", columns[asked][0]
    for row, value in enumerate(columns[asked][1:], 1):
        total += value
        work += f" + {cell(row, asked)} {value} = {total}"
    question = random_.choice((things[asked], "xy"[asked]))
    return Problem(f"{' . '.join(lines)} . {question} ?", work)


def cell(row: int, column: int) -> str:
    """Returns the coordinates of a number in a table, such as "by"."""
    return CELLS[2 * row + column]
