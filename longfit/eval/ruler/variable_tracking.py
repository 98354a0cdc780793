"""Variable tracking: vt (``scripts/data/synthetic/variable_tracking.py``), one chain of four hops, one example."""

import random
import string
from typing import Any

import numpy as np

from longfit.eval.ruler.draft import Draft, Surroundings, drafts, per_unit_bound
from longfit.eval.ruler.niah import NOISE

HEAD = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
TAIL = "Question: Find all variables that are assigned the value {query} in the text above."
ANSWER_PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, {num_v} variables are "
    "assigned the value {query}, they are: "
)
HOPS = 4
EXAMPLE_TOKENS = 500
EXAMPLE_VALUE = "12345"


class ChainMaker:
    """Makes samples without the example before them; a haystack's unit is a line of noise.

    Args:
        names: letters of a variable's name.
        value: of every chain; drawn where it is None.
    """

    def __init__(
        self,
        around: Surroundings,
        rng: random.Random,
        values: np.random.RandomState,
        step: int,
        names: int,
        value: str | None = None,
    ) -> None:
        self.around, self.random, self.values = around, rng, values
        self.step, self.names, self.value = step, names, value

    def state(self) -> Any:
        return self.random.getstate(), self.values.get_state()

    def restore(self, state: Any) -> None:
        self.random.setstate(state[0])
        self.values.set_state(state[1])

    def upper_bound(self, length: int) -> int:
        return per_unit_bound(self.tried(self.step), self.step, length)

    def tried(self, units: int) -> int:
        return self.around.tokens(self.chain(units))

    def draft(self, index: int, units: int) -> Draft:
        return self.chain(units)

    def chain(self, units: int) -> Draft:
        """A chain hidden in ``units`` lines of noise.

        Raises:
            ValueError: fewer lines than assignments.
            IndexError: two variables drew one name, where the original fails too.
        """
        variables = [self._name() for _ in range(HOPS + 1)]
        clashed = len(set(variables)) < HOPS + 1
        while len(set(variables)) < HOPS + 1:
            variables.append(self._name())
        value = self._value()
        if clashed:
            # The leftover names make a second, broken chain, for which the original draws a value before it fails.
            self._value()
            raise IndexError("two variables of one name")
        assignments = [f"VAR {variables[0]} = {value}"]
        assignments += [f"VAR {variables[j + 1]} = VAR {variables[j]} " for j in range(HOPS)]
        lines = [NOISE] * units
        places = sorted(self.random.sample(range(units), len(assignments)))
        for shift, (place, assignment) in enumerate(zip(places, assignments, strict=True)):
            lines.insert(place + shift, assignment)
        context = "\n".join(lines).replace(". \n", ".\n")
        prefix = ANSWER_PREFIX.format(num_v=HOPS + 1, query=value)
        return Draft(HEAD, context + "\n", TAIL.format(query=value), prefix, tuple(variables))

    def _name(self) -> str:
        return "".join(self.random.choices(string.ascii_uppercase, k=self.names))

    def _value(self) -> str:
        return self.value or str(self.values.randint(10000, 99999))


class TrackingMaker(ChainMaker):
    """vt: each sample reads the example, with other names and another value, before its own chain."""

    def __init__(self, around: Surroundings, length: int, seed: int) -> None:
        super().__init__(around, random.Random(seed), np.random.RandomState(seed), 10 if length >= 4096 else 5, 5)
        plain = Surroundings(around.tokenizer, False, "", "")
        shown = ChainMaker(plain, self.random, self.values, 5, 3, EXAMPLE_VALUE)
        (example,) = drafts(shown, plain, "vt's example", 1, EXAMPLE_TOKENS, 0)
        self.example = plain.text(example) + " " + " ".join(example.answers) + "\n"
        self.spare = around.count(self.example)

    def upper_bound(self, length: int) -> int:
        return per_unit_bound(super().tried(self.step), self.step, length)

    def tried(self, units: int) -> int:
        return super().tried(units) + self.spare

    def draft(self, index: int, units: int) -> Draft:
        own = self.chain(units)
        head = self._renamed() + "\n" + own.head
        return Draft(head, own.content, own.tail, own.answer_prefix, own.answers)

    def _renamed(self) -> str:
        example = self.example
        for name in self.example.strip().split()[-HOPS - 1 :]:
            example = example.replace(name, "".join(self.random.choices(string.ascii_uppercase, k=len(name))))
        return example.replace(EXAMPLE_VALUE, str(self.values.randint(10000, 99999)))
