"""Writes compat_golden.json: rows, and what Dromedary's merge filter makes of them.

    python3 make_goldens.py > compat_golden.json

The filter is stated here from the description of its rules, straight and without regard to speed,
and shares no code with the crate. `output` is the text as the original's generator decodes it
(no leading space, going on behind the user's turn); the test gives the crate what its own
generator would have written for it.
"""

import json
import random
import sys

AFFIRMATION = "I am a helpful, ethical, and reliable assistant."
MARKS = "\n.?!;:,`"
DROPPING = """User:
Good job! Clear context
Watson (auto reply):
Could you please provide more details or context so I can try to assist you better?
president
President
Zhiqing
孙之清
1, 1, 4
weather
or by watching the news or checking your local
alpaca
Alpaca
birthday party
Birthday party""".split("\n")


def clauses(text):
    """Pieces that end behind a mark; the last one may have none."""
    piece = ""
    for character in text:
        piece += character
        if character in MARKS:
            yield piece
            piece = ""
    if piece:
        yield piece


def up_to_first_repetition(text):
    kept = []
    for piece in clauses(text):
        single_mark = len(piece) == 1 and piece in MARKS
        if piece in kept and not single_mark:
            break
        kept.append(piece)
    return "".join(kept).strip()


def training_row(row):
    """The row that is trained on, or None."""
    output, instruction, input_ = row["output"], row["instruction"], row["input"]
    if output[: len(AFFIRMATION)] != AFFIRMATION:
        return None
    place = output.find("\n\nWatson:")
    if place < 0:
        return None
    answer = up_to_first_repetition(output[place + len("\n\nWatson:") :].strip())
    place = answer.find("\n\nUser:")
    if place >= 0:
        answer = answer[:place].strip() + "\n\n### User\n"
        if len(answer) < 160:
            return None
    else:
        place = answer.rfind(" ")
        if place >= 0:
            answer = answer[:place]
    if len(instruction) > 16 and answer.find(instruction) >= 0:
        return None
    if len(input_) > 16 and answer.find(input_) >= 0:
        return None
    if len(input_) > 16:
        instruction, input_ = input_, ""
    for word in DROPPING:
        if answer.find(word) >= 0:
            return None
    if answer == "":
        return None
    return {
        "instruction": instruction,
        "input": input_,
        "output": "Dromedary".join(answer.split("Watson")),
    }


LONG = (
    "A kettle turns the energy of the mains into heat, and the heat makes the water boil; steam rises "
    "through the spout, the switch notices it, and the current is cut before the pot runs dry"
)


def rows_by_hand():
    """Each rule at its border."""
    form = AFFIRMATION + " The user asks something.\n\nWatson: "
    next_turn = "\n\nUser: And then?"
    answer_of = lambda count: "a" * (count - len("\n\n### User\n"))
    outputs = [
        form + LONG + "." + next_turn,
        " " + form + LONG + "." + next_turn,
        form.lower() + LONG + "." + next_turn,
        AFFIRMATION + " Only thoughts, no answer.",
        AFFIRMATION + "\nWatson: one newline only",
        AFFIRMATION + "\n\nWatson:",
        AFFIRMATION + "\n\nWatson: word",
        AFFIRMATION + "\n\nWatson: two words",
        AFFIRMATION + "\n\nWatson: line\nbreak",
        AFFIRMATION + "\n\nWatson: \u001c\u00a0 odd spaces \u001f\u3000",
        form + answer_of(159) + next_turn,
        form + answer_of(160) + next_turn,
        form + "\u00e4\u00f6" + answer_of(158) + next_turn,
        form + "First this. Then that. First this. Never seen.",
        form + "First this. First this. Never seen.",
        form + "One, two, one, two, one",
        form + "Dots... and more... and `code` and `code` again",
        form + "a\n\nb\n\nc\n\na",
        form + LONG + "\nsame\nsame\n" + next_turn,
        form + LONG + ". \n\nWatson: a second answer. " + LONG + next_turn,
        form + "Ask Watson, or Watsonia, about " + LONG + "." + next_turn,
        form + "WATSON keeps its letters, and " + LONG + "." + next_turn,
        form + LONG + ". User: inside a line" + next_turn,
        form + LONG + next_turn + "\n\nWatson (internal thoughts): more",
    ]
    outputs += [form + LONG + ", " + word + " and so on." + next_turn for word in DROPPING]
    outputs += [form + LONG + ", PRESIDENT and Weather." + next_turn]
    for output in outputs:
        yield {"instruction": "Tell me about kettles.", "input": "", "output": output}
    full = form + LONG + "." + next_turn
    for instruction, input_ in [
        ("the switch noti", ""),
        ("the switch notic", ""),
        ("the switch notice", ""),
        ("x", "the switch notic"),
        ("x", "the switch notice"),
        ("Explain this:", "sixteen letters."),
        ("Explain this:", "seventeen letters"),
        ("The switch notices it", ""),
        ("", "a text of more than sixteen letters"),
    ]:
        yield {"instruction": instruction, "input": input_, "output": full}


def random_rows(count):
    """Fragments thrown together; most rows break a rule somewhere."""
    rng = random.Random(7)
    fragments = [
        "The tide", " turns", " twice a day", ".", ". ", ", ", "; ", ":", "?\n", "!\n\n", "`", "``",
        " Watson", " User", "\n\nUser:", "\n", "\n\n", " and the moon", " pulls the sea", "\u6f6e\u6c50",
        "\u3002", " 1, 1", ", 4", " president", "\u00a0", "\u001c", " " + LONG, " " + LONG.upper(), "\t",
    ]
    for _ in range(count):
        body = "".join(rng.choice(fragments) for _ in range(rng.randint(0, 24)))
        head = rng.choice([AFFIRMATION] * 8 + [AFFIRMATION[:-1], ""])
        mark = rng.choice(["\n\nWatson:"] * 8 + ["\n\nWatson: ", "\nWatson:"])
        pieces = [" pulls the sea", "The tide turns twice a day", "Why?", LONG[:40], ""]
        yield {
            "instruction": rng.choice(pieces),
            "input": rng.choice(["", "", "", rng.choice(pieces)]),
            "output": head + " Thoughts" + mark + body,
        }


cases = [{**row, "kept": training_row(row)} for row in [*rows_by_hand(), *random_rows(300)]]
json.dump(cases, sys.stdout, ensure_ascii=True, indent=0)
sys.stdout.write("\n")
