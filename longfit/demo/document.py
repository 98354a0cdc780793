"""The keeper's log: the same long document every time, with one line in its middle that the demo asks for."""

import calendar
from importlib.resources import files

TITLE = "The log of the lighthouse at Carrow Point, kept for one year by Edmund Hale."
FACT = "A parrot came with the supply boat. The parrot's name is Solomon."
QUESTION = "A parrot came to the lighthouse. What is the parrot's name?"
ANSWER = "Solomon"

WINDS = ("south-west", "north", "west", "east", "north-west", "south", "south-east", "north-east")
STRENGTHS = ("a light breeze", "a fresh breeze", "half a gale", "hardly any wind", "a steady wind", "a gale")
SEAS = ("a long swell", "a short, steep sea", "calm water", "broken water on the reef", "a moderate sea")
VESSELS = (
    "Two brigs and a ketch passed.",
    "No sail in sight.",
    "A collier passed to the north.",
    "Five fishing boats out, all home by dusk.",
    "The packet went by on time.",
)
SKIES = ("clear", "overcast", "hazy", "bright between showers", "grey and low", "misty until noon", "pale")


def entries() -> list[str]:
    """The log's entries in order, one per note in `notes.txt`; the middle one also holds `FACT`."""
    notes = files(__package__).joinpath("notes.txt").read_text(encoding="utf-8").splitlines()
    days = [(month, day) for month in range(1, 13) for day in range(1, calendar.monthrange(1905, month)[1] + 1)]
    made = []
    for number, note in enumerate(notes):
        month, day = days[number * len(days) // len(notes)]
        weather = (
            f"{STRENGTHS[number % len(STRENGTHS)].capitalize()} from the {WINDS[number * 3 % len(WINDS)]}, "
            f"{SEAS[number % len(SEAS)]}, the sky {SKIES[number % len(SKIES)]}."
        )
        passing = VESSELS[number % len(VESSELS)]
        fact = f" {FACT}" if number == len(notes) // 2 else ""
        made.append(f"{day} {calendar.month_name[month]}. {weather} {passing} {note}{fact}")
    return made


def document() -> str:
    """The whole log as text."""
    return "\n\n".join([TITLE, *entries()]) + "\n"
